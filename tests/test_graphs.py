"""Graphs: syntax trees as data, computation trees, mining, graph networks, Mirage."""

import itertools

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("torch_geometric")

from limbeck import schema, zoo
from limbeck.condensation.graph_problem import GraphProblem
from limbeck.condensation.graphset import GraphSet, Member
from limbeck.condensation.methods.mirage import Mirage
from limbeck.condensation.trees import Forest, frequent_sets
from limbeck.data import open_data
from limbeck.data.graphs import Graph, GraphSplit, syntax_graph, union
from limbeck.engine.session import Session
from limbeck.errors import UserError


def random_graph(nodes, seed, kinds=3):
    generator = torch.Generator().manual_seed(seed)
    pairs = [(i, int(torch.randint(i, (), generator=generator))) for i in range(1, nodes)]
    pairs += [
        (i, j) for i, j in itertools.combinations(range(nodes), 2) if torch.rand((), generator=generator) < 0.15 and (i, j) not in pairs
    ]
    pairs = {tuple(sorted(p)) for p in pairs}
    edges = torch.tensor([[a, b] for a, b in pairs] + [[b, a] for a, b in pairs]).T
    return Graph(torch.randint(kinds, (nodes,), generator=generator), edges)


# ---- data ----


def test_no_file_is_in_two_parts():
    data = open_data("stdlib-graphs")
    parts = [data.train, data.valid, data.test]
    files = [set(part.files) for part in parts]
    assert not files[0] & files[1] and not files[0] & files[2] and not files[1] & files[2]
    for part in parts:
        assert isinstance(part, GraphSplit) and {0, 1} == set(part.labels.tolist())
        assert all(20 <= len(g.types) <= 150 for g in part.graphs)
    assert open_data("stdlib-graphs").fingerprint == data.fingerprint
    assert open_data("stdlib-graphs", packages=("asyncio", "email")).classes == ("asyncio", "email")


def test_a_syntax_tree_is_a_tree():
    import ast

    graph = syntax_graph(ast.parse("def f(x):\n return x + 1").body[0])
    assert graph.edges.shape[1] == 2 * (len(graph.types) - 1)
    assert torch.equal(graph.edges[:, 0::2], graph.edges[:, 1::2].flip(0))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"packages": ("email",)}, "at least two"),
        ({"packages": ("email", "nothing_here")}, "no package"),
        ({"packages": ("email", "ast")}, "no package"),
    ],
)
def test_packages_that_cannot_be_read(args, message):
    with pytest.raises(UserError, match=message):
        open_data("stdlib-graphs", **args)


def test_a_geometric_set_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        open_data("pyg:NCI1", root=str(tmp_path))


def test_a_union_keeps_graphs_apart():
    a, b = random_graph(4, 0), random_graph(3, 1)
    joined = union([a, b])
    assert joined["batch"].tolist() == [0] * 4 + [1] * 3
    assert torch.equal(joined["edge_index"][:, a.edges.shape[1] :] - 4, b.edges)


# ---- computation trees ----


def expanded(graph, node, hops):
    """The same tree as nested tuples, without numbers: an independent canonical form."""
    near = graph.edges[0][graph.edges[1] == node].tolist() if hops else []
    return (int(graph.types[node]), tuple(sorted(expanded(graph, u, hops - 1) for u in near)))


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_equal_numbers_are_isomorphic_trees(hops):
    forest = Forest()
    seen = {}
    for seed in range(12):
        graph = random_graph(7, seed, kinds=2)
        for node, number in enumerate(forest.trees(graph, hops)):
            tree = expanded(graph, node, hops)
            assert seen.setdefault(number, tree) == tree
    assert len(set(seen.values())) == len(seen)


def test_a_permuted_graph_has_the_same_trees():
    graph, order = random_graph(9, 3), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    other = Graph(graph.types[order], place[graph.edges])
    forest = Forest()
    assert sorted(forest.trees(graph, 3)) == sorted(forest.trees(other, 3))


def test_the_work_is_linear_in_the_graphs():
    def work(count):
        forest = Forest()
        for seed in range(count):
            forest.trees(random_graph(8, seed), 2)
        return forest.steps

    assert work(40) == pytest.approx(2 * work(20), rel=0.2)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_isomorphism_network_sees_the_same_root(layers):
    """At as many hops as layers, the root of the rebuilt tree has the embedding that the node has in the whole graph."""
    torch.manual_seed(0)
    network = zoo.build("gin", input_shape=(3,), classes=2, hidden=8, layers=layers).double().eval()
    graph, forest = random_graph(8, 5), Forest()
    numbers = forest.trees(graph, layers)
    whole = network.nodes(graph.types, graph.edges)
    tree, roots = forest.rebuild(numbers)
    assert len(tree.types) == sum(forest.size(n) for n in numbers)
    assert torch.allclose(network.nodes(tree.types, tree.edges)[roots], whole, atol=1e-12)
    shorter = forest.rebuild([forest.number(int(kind)) for kind in graph.types])
    assert not torch.allclose(network.nodes(shorter[0].types, shorter[0].edges)[shorter[1]], whole)


def test_mining_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    transactions = [set(torch.randint(6, (3,), generator=generator).tolist()) for _ in range(20)]
    found = frequent_sets(transactions, 0.2, longest=2)
    expected = {}
    for size in (1, 2):
        for combination in itertools.combinations(range(6), size):
            count = sum(set(combination) <= t for t in transactions)
            if count / 20 >= 0.2:
                expected[frozenset(combination)] = count
    assert found == expected and frequent_sets([{1}, {2}, {3}], 0.9) == {}


# ---- the set ----


def toy_problem(per_class=3):
    data = open_data("stdlib-graphs")
    return GraphProblem(data, schema.Condense(per_class=per_class), Session())


def test_mined_sets_keep_their_budget_and_survive_their_file(tmp_path):
    problem = toy_problem()
    method = Mirage(hops=1)
    made = method.begin(problem)
    for c in range(2):
        assert sum(m.bytes() for m in made.members if m.label == c) <= problem.budget
    assert {m.label for m in made.members} == {0, 1}
    made.save(tmp_path / "dataset", card="x")
    opened = GraphSet.load(tmp_path)
    assert opened.fingerprint() == made.fingerprint()
    for a, b in zip(made.members, opened.members):
        assert torch.equal(a.roots, b.roots) and torch.equal(a.graph.edges, b.graph.edges) and a.support == b.support
    assert len(made.geometric()) == len(made)
    content = (tmp_path / "dataset" / "set.safetensors").read_bytes()
    (tmp_path / "dataset" / "set.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="altered"):
        GraphSet.load(tmp_path)


def test_no_set_is_frequent_in_two_classes():
    problem = toy_problem()
    shared = Mirage(hops=1, drop_shared=False, supports=(0.5,)).begin(problem)
    apart = Mirage(hops=1, supports=(0.3,)).begin(problem)

    def trees(members, label):
        return {(tuple(m.graph.types.tolist()), tuple(m.graph.edges.flatten().tolist())) for m in members if m.label == label}

    assert trees(shared.members, 0) & trees(shared.members, 1)
    assert not trees(apart.members, 0) & trees(apart.members, 1)


def test_real_graphs_survive_their_file(tmp_path):
    made = toy_problem().initial("real")
    made.save(tmp_path)
    opened = GraphSet.load(tmp_path)
    for a, b in zip(made.members, opened.members):
        assert torch.equal(a.graph.types, b.graph.types) and {*map(tuple, a.graph.edges.T.tolist())} == {
            *map(tuple, b.graph.edges.T.tolist())
        }


def test_a_budget_that_is_too_small():
    with pytest.raises(UserError, match="no graph of the class"):
        GraphSet([Member(random_graph(4, 0), 0)], ("a", "b"), 3)
    with pytest.raises(UserError, match="no set of trees"):
        Mirage(hops=3, supports=(1.0,)).begin(toy_problem())


def test_mirage_from_the_command_line(limbeck, tmp_path):
    import json

    import yaml

    recipe = {
        "name": "graphs",
        "method": {"id": "mirage", "hops": 1},
        "student": "gin",
        "data": "stdlib-graphs",
        "condense": {
            "per_class": 3,
            "students": {"steps": 20, "optimizer": "adam", "lr": 0.01},
            "seeds": 1,
            "networks": ["sage"],
            "baselines": ["random-real"],
        },
        "threads": 1,
        "trackers": [],
    }
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(recipe))
    done = limbeck("run", "g.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["metrics"]["student"]["auc"] < 1 and summary["metrics"]["student"]["bytes"] > 0
    assert (tmp_path / "run" / "dataset" / "set.safetensors").is_file() and "mirage" in done.stdout
    assert "geometric()" in (tmp_path / "run" / "dataset" / "README.md").read_text()
    again = limbeck("evaluate", "run", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert {name: score["mean"] for name, score in found["scores"].items()} == pytest.approx(found["recorded"])
    wrong = limbeck("run", "g.yaml", "--out", "other", "--set", "method=distribution-matching", cwd=tmp_path)
    assert wrong.returncode == 2 and "condenses samples" in wrong.stderr and "Traceback" not in wrong.stderr
    student = limbeck("run", "g.yaml", "--out", "third", "--set", "student=cnn", cwd=tmp_path)
    assert student.returncode == 2 and "does not read graphs" in student.stderr
