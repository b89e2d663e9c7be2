"""Mirage and what judges it: exactness by convolution, mining, supports, bytes, budgets, areas, refusals."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mlxtend")
pytest.importorskip("torch_geometric")

from limbeck import method as registry
from limbeck import recipe as recipes
from limbeck import schema, zoo
from limbeck.condensation.graph_problem import GraphProblem, GraphProtocol
from limbeck.condensation.graphset import LARGEST, MOST, GraphSet, Member
from limbeck.condensation.methods.mirage import Mirage
from limbeck.condensation.trees import Forest, frequent_sets
from limbeck.data import open_data
from limbeck.data.graphs import Graph, GraphSplit
from limbeck.engine.session import Session
from limbeck.errors import UserError


def ring(kinds, tails=()):
    """A ring of the given types, with a further node of a type hung on some of its places."""
    types, pairs = list(kinds), [(i, (i + 1) % len(kinds)) for i in range(len(kinds))]
    for place, kind in tails:
        pairs.append((place, len(types)))
        types.append(kind)
    edges = torch.tensor(pairs).T
    return Graph(torch.tensor(types), torch.cat([edges, edges.flip(0)], 1))


@pytest.fixture(scope="module")
def data():
    return open_data("stdlib-graphs")


def problem_of(data, **condense):
    return GraphProblem(data, schema.Condense(**{"per_class": 3, **condense}), Session())


# ---- computation trees ----


def nested(graph, node, hops):
    near = graph.edges[0][graph.edges[1] == node].tolist() if hops else []
    return (int(graph.types[node]), tuple(sorted(nested(graph, u, hops - 1) for u in near)))


def test_trees_against_networkx():
    """Two nodes have one number exactly when a general isomorphism search maps one rooted tree onto the other."""
    networkx = pytest.importorskip("networkx")
    forest = Forest()
    graph = ring([0, 1, 0, 1, 1, 0, 1], [(0, 1), (2, 1), (4, 0)])
    numbers = forest.trees(graph, 2)

    def drawn(number):
        tree, roots = forest.rebuild([number])
        made = networkx.DiGraph()
        made.add_nodes_from((i, {"kind": (int(k), i == int(roots))}) for i, k in enumerate(tree.types))
        made.add_edges_from(tree.edges.T.tolist())
        return made

    trees = [drawn(n) for n in numbers]
    for a, b in itertools.combinations(range(len(trees)), 2):
        same = networkx.is_isomorphic(trees[a], trees[b], node_match=lambda x, y: x["kind"] == y["kind"])
        assert same == (numbers[a] == numbers[b])
    assert 1 < len(set(numbers)) < len(numbers)


@pytest.mark.parametrize(("name", "exact"), [("gin", True), ("sage", True), ("gcn", False)])
def test_which_networks_see_the_same_root(name, exact):
    """Sums and means of the children need nothing but the tree; GCN divides by degrees, which the leaves of a tree have lost."""
    torch.manual_seed(0)
    graph, forest = ring([0, 1, 2, 1, 0, 2], [(0, 2), (3, 1)]), Forest()
    network = zoo.build(name, input_shape=(3,), classes=2, hidden=8, layers=2).double().eval()
    tree, roots = forest.rebuild(forest.trees(graph, 2))
    gap = (network.nodes(tree.types, tree.edges)[roots] - network.nodes(graph.types, graph.edges)).abs().max()
    assert (gap < 1e-12) if exact else (gap > 1e-3)


def test_the_network_sums_roots_only():
    """Logits of a mined set are the head of the sum over the roots, whatever else is in the batch."""
    torch.manual_seed(0)
    graph, forest = ring([0, 1, 2, 1], [(0, 2)]), Forest()
    network = zoo.build("gin", input_shape=(3,), classes=2, hidden=8).double().eval()
    numbers = forest.trees(graph, 2)
    members = [Member(*forest_member(forest, numbers[:2]), 2.0), Member(*forest_member(forest, numbers[2:3], 1), 1.0)]
    inputs, labels = GraphSet(members, ("a", "b"), 3).batch(torch.tensor([1, 0]))
    h = network.nodes(graph.types, graph.edges)
    assert labels.tolist() == [1, 0]
    assert torch.allclose(network(**inputs), network.head(torch.stack([h[2], h[0] + h[1]])), atol=1e-12)


def forest_member(forest, numbers, label=0):
    graph, roots = forest.rebuild(numbers)
    return graph, label, roots


# ---- mining ----


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 5), max_size=5), min_size=1, max_size=25),
    st.integers(1, 100),
    st.integers(1, 3),
)
def test_mining_against_enumeration(transactions, percent, longest):
    """Every set up to the greatest size, with its exact count; shares are compared in whole numbers."""
    expected = {}
    for size in range(1, longest + 1):
        for items in itertools.combinations(range(6), size):
            count = sum(set(items) <= t for t in transactions)
            if count and 100 * count >= percent * len(transactions):
                expected[frozenset(items)] = count
    assert frequent_sets(transactions, percent / 100, longest) == expected


def test_a_set_at_the_very_threshold_is_frequent():
    """0.07 * 100 is above 7 in floating point; 7 of 100 graphs are 7 %, 6 are not."""
    every = [frozenset(c) for size in (1, 2, 3) for c in itertools.combinations((1, 2, 3), size)]
    assert frequent_sets([{1, 2, 3}] * 7 + [set()] * 93, 0.07) == dict.fromkeys(every, 7)
    assert frequent_sets([{1, 2, 3}] * 6 + [set()] * 94, 0.07) == {}
    branched = [{1, 2}] * 7 + [{1}] * 20 + [{2}] * 20 + [set()] * 53
    assert frequent_sets(branched, 0.07)[frozenset({1, 2})] == 7


def test_supports_are_recounted(data):
    """Each member's support is the number of its class's graphs that hold all its trees, and no other class has it as often."""
    problem, method = problem_of(data), Mirage(hops=1)
    made = method.begin(problem)
    level = method.figures(made, problem)["support"]
    holds = [{nested(g, v, 1) for v in range(len(g.types))} for g in problem.train.graphs]
    labels = problem.train.labels.tolist()
    sizes = [labels.count(c) for c in (0, 1)]
    for member in made.members:
        trees = {nested(member.graph, root, 1) for root in member.roots.tolist()}
        assert len(trees) == len(member.roots) <= method.longest and all(children for _, children in trees)
        counts = [sum(trees <= own for own, label in zip(holds, labels) if label == c) for c in (0, 1)]
        assert counts[member.label] == member.support >= level * sizes[member.label]
        other = 1 - member.label
        assert counts[other] < level * sizes[other]


def test_nodes_without_neighbours_are_skipped():
    """An isolated node's tree has no edge, so that its root could not be told from the file; the others are mined without it."""
    data = toy()
    alone = [Graph(torch.cat([g.types, torch.tensor([3 * (i % 2)])]), g.edges) for i, g in enumerate(data.train.graphs)]
    data.train = GraphSplit(alone, data.train.labels, 4)
    made = Mirage(hops=1).begin(problem_of(data, per_class=8))
    assert all(bool((m.graph.edges[1] == root).any()) for m in made.members for root in m.roots)


def test_nothing_is_trained_and_nothing_is_drawn(data):
    torch.manual_seed(3)
    before, method = torch.get_rng_state(), Mirage(hops=2)
    first = method.begin(problem_of(data))
    assert torch.equal(before, torch.get_rng_state()) and method.optimizers(first) == {} and method.iterations == 0
    assert first.fingerprint() == Mirage(hops=2).begin(problem_of(data)).fingerprint()


# ---- the set ----


@pytest.mark.parametrize("kind", ["mined", "real"])
def test_counted_bytes_are_those_of_the_file(data, kind, tmp_path):
    from safetensors.torch import load_file

    problem = problem_of(data)
    made = Mirage(hops=1).begin(problem) if kind == "mined" else problem.initial("real")
    made.save(tmp_path)
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "set.safetensors").values())
    assert stored == made.size() == sum(m.bytes() for m in made.members)


@pytest.mark.parametrize("per_class", [1, 3, 9])
@pytest.mark.parametrize("id", ["mirage", "random-real", "herding", "k-center"])
def test_every_selection_spends_its_budget(data, id, per_class):
    """No class goes over its budget, and none leaves more of it than the smallest graph would need."""
    problem = problem_of(data, per_class=per_class)
    made = registry.make(id, {"hops": 1} if id == "mirage" else {}).begin(problem)
    for c in range(2):
        spent = sum(m.bytes() for m in made.members if m.label == c)
        assert problem.budget - 120 < spent <= problem.budget


def test_draws_follow_the_support():
    members = [Member(ring([0, 0, 0]), 0, torch.tensor([0]), 3.0), Member(ring([1, 1, 1]), 1, torch.tensor([0]), 1.0)]
    torch.manual_seed(0)
    drawn = GraphSet(members, ("a", "b"), 2, weighted=True).draw(8000)
    assert abs(float((drawn == 0).double().mean()) - 0.75) < 0.02
    assert sorted(GraphSet(members, ("a", "b"), 2).draw(2).tolist()) == [0, 1]
    assert GraphSet(members, ("a", "b"), 2).fingerprint() != GraphSet(members, ("a", "b"), 2, weighted=True).fingerprint()


def test_what_a_file_cannot_hold():
    members = [Member(ring([0, 0, 0]), c) for c in (0, 1)]
    with pytest.raises(UserError, match="at most"):
        GraphSet(members, ("a", "b"), MOST + 1)
    large = Graph(torch.zeros(LARGEST + 1, dtype=torch.long), torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(UserError, match="at most"):
        GraphSet([members[0], Member(large, 1)], ("a", "b"), 2)


# ---- judging ----


def toy(count=60):
    """Rings whose class is told by one type of node, in some places; three parts."""
    torch.manual_seed(0)
    graphs = [ring(torch.randint(2, (6,)).tolist(), [(0, 2 + i % 2)]) for i in range(count)]
    labels = torch.tensor([i % 2 for i in range(count)])
    split = GraphSplit(graphs, labels, 4)
    parts = [split.subset(torch.arange(i, count, 3)) for i in range(3)]
    return SimpleNamespace(
        train=parts[0], valid=parts[1], test=parts[2], classes=("a", "b"), input_shape=(4,), fingerprint="toy", name="toy"
    )


TOY = {
    "name": "toy",
    "method": {"id": "mirage"},
    "student": "gin",
    "condense": {"per_class": 8, "seeds": 2, "students": {"steps": 120, "optimizer": "adam", "lr": 0.01, "weight_decay": 0}},
}


@pytest.mark.parametrize("network", ["gin", "gcn", "sage", "zoo:gin"])
def test_students_learn_from_mined_trees_what_real_graphs_show(network):
    """The class hangs on a neighbourhood that mining must find; students of the mined set read it off real graphs."""
    recipe = recipes.resolve({**TOY, "student": network})
    problem = GraphProblem(toy(), recipe.condense, Session())
    made = Mirage(hops=1).begin(problem)
    score = problem.protocol(recipe).score(made)
    assert score.mean > 0.7 and score.metrics["auc"] > 0.85 and len(score.accuracies) == 2
    swapped = GraphSet(
        [Member(m.graph, 1 - m.label, m.roots, m.support) for m in made.members], made.classes, made.node_types, made.weighted
    )
    assert problem.protocol(recipe).score(swapped).metrics["auc"] < 0.2


def test_area_under_the_curve_by_counting_pairs():
    """The area is the share of pairs of classes that are ranked rightly; half for ties."""
    recipe = recipes.resolve(TOY)
    protocol = GraphProtocol(GraphProblem(toy(), recipe.condense, Session()), recipe)
    torch.manual_seed(1)
    network = zoo.build("gcn", input_shape=(4,), classes=2, hidden=4).eval()
    accuracy, area = protocol._accuracy(network)
    split = protocol.split
    logits = torch.cat([network(**split.batch(torch.tensor([i])).inputs) for i in range(len(split))]).detach()
    ranks = logits.softmax(1)[:, 1]
    pairs = [
        (ranks[i] > ranks[j]).double() + 0.5 * (ranks[i] == ranks[j]).double()
        for i in range(len(split))
        for j in range(len(split))
        if split.labels[i] == 1 and split.labels[j] == 0
    ]
    assert area == pytest.approx(float(torch.stack(pairs).mean()), abs=0.02)
    assert accuracy == pytest.approx(float((logits.argmax(1) == split.labels).double().mean()))


def test_hidden_labels_are_not_learnt_from():
    """Graphs whose label is hidden belong to no class: not to a selection, not to the whole set."""
    data = toy()
    data.train = data.train.with_labels(torch.tensor([label if i % 3 else -1 for i, label in enumerate(data.train.labels.tolist())]))
    recipe = recipes.resolve({**TOY, "condense": {**TOY["condense"], "per_class": 3, "seeds": 1, "whole_training": {"steps": 3}}})
    problem = GraphProblem(data, recipe.condense, Session())
    assert {m.label for m in problem.initial("real").members} == {0, 1}
    assert len(problem.protocol(recipe).whole().accuracies) == 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("condense", "message"),
    [
        ({"scores": True}, "condense.scores"),
        ({"budgets": [1, 2]}, "condense.budgets"),
        ({"baselines": [{"id": "k-means"}]}, "k-means"),
        ({"augment": ["shift:1"]}, "augmented"),
        ({"per_class": 10_000}, "fewer than the 10000"),
    ],
)
def test_what_graphs_cannot_do_is_said_before_any_work(data, condense, message):
    with pytest.raises(UserError, match=message):
        problem_of(data, **condense)


def test_packages_in_odd_places(tmp_path, monkeypatch):
    """A folder called test above a package hides nothing, one inside it does; a file that is no Python is named."""
    body = "def f(x):\n    return [x + i for i in range(10)] + [x * i for i in range(20)]\n"
    for name in ("pack_one", "pack_two"):
        folder = tmp_path / "test" / name
        (folder / "tests").mkdir(parents=True)
        for i in range(5):
            (folder / f"m{i}.py").write_text("\ufeff" + body, encoding="utf-8")
        (folder / "tests" / "bad.py").write_text("def (")
        (folder / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "test")])
    data = open_data("stdlib-graphs", packages=("pack_one", "pack_two"))
    assert len(data.train) + len(data.valid) + len(data.test) == 10
    assert {name for part in (data.train, data.valid, data.test) for name in part.files} == {
        f"{p}:m{i}.py" for p in ("pack_one", "pack_two") for i in range(5)
    }
    with pytest.raises(UserError, match="named once"):
        open_data("stdlib-graphs", packages=("pack_one", "pack_one"))
    (tmp_path / "test" / "pack_two" / "m0.py").write_text("def (")
    with pytest.raises(UserError, match="no source of this Python"):
        open_data("stdlib-graphs", packages=("pack_one", "pack_two"))


def test_a_geometric_set_from_a_folder(tmp_path):
    """Two triangles and a path in the text files of the TU collection, read without a network."""
    raw = tmp_path / "TOYS" / "raw"
    raw.mkdir(parents=True)
    pairs = [(1, 2), (2, 3), (3, 1), (4, 5), (5, 6), (6, 4), (7, 8), (8, 9)]
    (raw / "TOYS_A.txt").write_text("".join(f"{a}, {b}\n{b}, {a}\n" for a, b in pairs))
    (raw / "TOYS_graph_indicator.txt").write_text("1\n" * 3 + "2\n" * 3 + "3\n" * 3)
    (raw / "TOYS_graph_labels.txt").write_text("1\n1\n2\n")
    (raw / "TOYS_node_labels.txt").write_text("0\n1\n2\n" * 3)
    from limbeck.data.graphs import read_geometric

    source = read_geometric("TOYS", str(tmp_path))
    assert source.train.labels.tolist() == [0, 0, 1] and source.shape == (3,)
    assert [g.types.tolist() for g in source.train.graphs] == [[0, 1, 2]] * 3
    assert [g.edges.shape[1] for g in source.train.graphs] == [6, 6, 4]
    forest = Forest()
    first, second, path = (forest.trees(g, 1) for g in source.train.graphs)
    assert first == second and path != first


# ---- what comes with it ----


def test_the_embedded_recipe_is_valid():
    recipe = recipes.load("tiny-graphs")
    assert recipe.method.id == "mirage" and recipe.data.source == "stdlib-graphs"
    GraphProblem(open_data(recipe.data.source), recipe.condense, Session())
