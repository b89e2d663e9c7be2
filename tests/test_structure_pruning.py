"""Removal of channels, heads and layers: what is left says what it should, opens again, exports, learns, and meets its budget."""

import copy
import json

import pytest
import torch
from torch import nn

import limbeck
from limbeck.errors import UserError
from limbeck.evaluation.budget import Budget
from limbeck.evaluation.cost import count_flops
from limbeck.structure import pruning
from limbeck.structure.methods.gcp_sad import GCPSAD
from limbeck.zoo import build, load_model, save_model
from limbeck.zoo.files import signed

SHAPE = (1, 8, 8)
NETWORKS = [
    ("cnn", {"width": 6}),
    ("resnet", {"depth": 14}),
    ("mlp", {"widths": [16, 12]}),
    ("vit", {"depth": 2, "dim": 24}),
    ("mixer", {"depth": 2, "dim": 16}),
    ("convnet", {"depth": 2, "width": 8}),
    ("convnet", {"depth": 2, "width": 8, "norm": "batch"}),
]


def lived_in(ref, args, seed=0):
    """A network whose norms have been used: running statistics, scales and biases are not those of a fresh one."""
    torch.manual_seed(seed)
    network = build(ref, input_shape=SHAPE, classes=10, **args)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


def pictures(count=4):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


# ---- removal ----


@pytest.mark.parametrize("ref,args", NETWORKS)
def test_smaller_networks_stay_ordinary(ref, args, tmp_path):
    """Smaller, cheaper, saved, opened, exported; the whole network is untouched."""
    network, x = lived_in(ref, args), pictures()
    before = copy.deepcopy(network.state_dict())
    groups = pruning.find_groups(network, x)
    smaller = pruning.removed(network, groups, {g.name: list(range(1, g.units, 2)) for g in groups}).eval()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert type(smaller) is type(network)
    assert sum(p.numel() for p in smaller.parameters()) < 0.65 * sum(p.numel() for p in network.parameters())
    assert count_flops(smaller, x) < 0.75 * count_flops(network, x)
    save_model(smaller, tmp_path / "kept")
    again = load_model(tmp_path / "kept").eval()
    assert torch.equal(again(x), smaller(x))


def test_narrow_cnn_by_hand():
    """Channels 1 and 4 of stage 0 and 0 of stage 2 removed by slicing every tensor here."""
    network, x = lived_in("cnn", {"width": 6}), pictures()
    groups = pruning.find_groups(network, x)
    smaller = pruning.removed(network, groups, {"stages.0.0": [1, 4], "stages.2.0": [0]}).eval()
    keep0, keep2 = [0, 2, 3, 5], list(range(1, 12))
    state = {k: v.clone() for k, v in network.state_dict().items()}
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        state[f"stages.0.{name}"] = state[f"stages.0.{name}"][keep0]
        state[f"stages.2.{name}"] = state[f"stages.2.{name}"][keep2]
    state["stages.1.0.weight"] = state["stages.1.0.weight"][:, keep0]
    state["head.weight"] = state["head.weight"][:, keep2]
    assert {k: tuple(v.shape) for k, v in smaller.state_dict().items()} == {k: tuple(v.shape) for k, v in state.items()}
    assert all(torch.equal(value, state[name]) for name, value in smaller.state_dict().items())
    assert (smaller.stages[0][0].out_channels, smaller.stages[1][0].in_channels, smaller.head.in_features) == (4, 4, 11)


def test_silent_channels_of_tied_layers_can_go_exactly():
    """With scale and bias 0 in every layer that a shortcut ties, a channel says nothing: without it all outputs are the same."""
    network, x = lived_in("resnet", {"depth": 14}), pictures()
    groups = pruning.find_groups(network, x)
    tied = next(g for g in groups if g.name == "stem.0")
    assert tied.tied and {s.path for s in tied.slices if s.norm} == {"stem.1", "stages.0.0.norm2", "stages.0.1.norm2"}
    assert not next(g for g in groups if g.name == "stages.0.0.conv1").tied
    for norm in (network.stem[1], network.stages[0][0].norm2, network.stages[0][1].norm2):
        norm.weight.data[[2, 7]] = 0
        norm.bias.data[[2, 7]] = 0
    smaller = pruning.removed(network, groups, {"stem.0": [2, 7]}).eval()
    assert smaller.stem[0].out_channels == 14
    assert torch.allclose(smaller(x), network(x), atol=1e-5)


def test_heads_of_attention():
    """A head whose columns of the output projection are 0 can go exactly; the other heads keep their size."""
    network, x = lived_in("vit", {"depth": 2, "dim": 24}), pictures()
    groups = pruning.find_groups(network, x, kinds=("heads",))
    assert [g.units for g in groups] == [4, 4]
    attention = network.stages[1].attention
    attention.project.weight.data[:, 6:12] = 0  # head 1 of width 6
    smaller = pruning.removed(network, groups, {"stages.1.attention": [1]}).eval()
    cut = smaller.stages[1].attention
    assert cut.heads == 3 and cut.qkv.weight.shape == (54, 24) and cut.project.weight.shape == (24, 18)
    rows = [r for part in range(3) for r in range(part * 24, part * 24 + 24) if not part * 24 + 6 <= r < part * 24 + 12]
    assert torch.equal(cut.qkv.weight, attention.qkv.weight[rows])
    assert torch.allclose(smaller(x), network(x), atol=1e-5)


def test_whole_layers():
    """What is left out passes on what it gets; influence is 1 - cosine of what went in and came out."""
    network, x = lived_in("vit", {"depth": 3, "dim": 24}), pictures()
    influence = pruning.block_influence(network, x)
    assert list(influence) == ["stages.0", "stages.1", "stages.2"]
    with torch.no_grad():
        a = network.stages[0](network.stem(x))
        b = network.stages[1](a)
        cosine = (a.flatten(1) * b.flatten(1)).sum(1) / a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
        assert influence["stages.1"] == pytest.approx(float(1 - cosine.mean()), abs=1e-5)
        smaller = pruning.without_layers(network, ["stages.1"], x).eval()
        assert torch.allclose(smaller(x), network.head(network.pool(network.stages[2](a))), atol=1e-6)
    with pytest.raises(UserError, match=r"'head'.*cannot be left out"):
        pruning.without_layers(network, ["head"], x)


class Foreign(nn.Module):
    """Concatenation, depthwise convolution, a free parameter, a dict as output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
        self.deep = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.gain = nn.Parameter(torch.rand(10, 1, 1) + 0.5)
        self.mix = nn.Conv2d(10, 8, 1)
        self.out = nn.Linear(8 * 64, 10)

    def forward(self, x):
        both = torch.cat([self.a(x), self.b(x)], 1).relu()
        return {"logits": self.out(self.mix(self.deep(both)).relu().flatten(1))}


def test_foreign_networks(tmp_path):
    """A group that ends in a flattened head; joined channels are refused; the folder opens with an instance."""
    torch.manual_seed(0)
    network, x = Foreign(), pictures()
    groups = pruning.find_groups(network, x)
    assert {g.name for g in groups} == {"mix"} and "divide evenly" in groups.refused["deep"]
    smaller = pruning.removed(network, groups, {"mix": [0, 3]})
    assert smaller.out.in_features == 6 * 64
    expected = copy.deepcopy(network)
    expected.out.weight.data.view(10, 8, 64)[:, [0, 3]] = 0
    assert torch.allclose(smaller(x)["logits"], expected(x)["logits"], atol=1e-5)
    save_model(smaller, tmp_path / "kept")
    with pytest.raises(UserError, match="cut from a Python object"):
        load_model(tmp_path / "kept")
    again = load_model(tmp_path / "kept", model=Foreign())
    assert torch.equal(again(x)["logits"], smaller(x)["logits"])


@pytest.mark.parametrize(
    "network,why",
    [
        (build("linear", input_shape=SHAPE, classes=10), "head: its outputs are the network's outputs"),
        (
            build("convnet", input_shape=SHAPE, classes=10, width=8, depth=1, norm="group"),
            "stages.0.1 normalises several channels together",
        ),
    ],
)
def test_what_cannot_be_pruned_is_named(network, why):
    with pytest.raises(UserError, match=why):
        pruning.find_groups(network, pictures())


def test_transformers_are_refused():
    from limbeck.zoo import Tokens

    model = build("bert", tokens=Tokens(64, 16, "classification", pad=0, classes=3), layers=1, width=16, heads=2)
    with pytest.raises(UserError, match=r"BertForSequenceClassification.*configuration"):
        pruning.find_groups(model, {"input_ids": torch.ones(2, 4, dtype=torch.long)})


def test_a_forward_that_writes_down_its_widths():
    """A group that the tracer offers but the network cannot do without is refused."""

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(64, 6), nn.Linear(6, 8), nn.Linear(8, 10)

        def forward(self, x):
            hidden = self.one(x.flatten(1))
            return self.three(self.two(hidden.view(-1, 6).relu()).relu())

    groups = pruning.find_groups(Stubborn(), pictures())
    assert [g.name for g in groups] == ["two"] and "does not run without" in groups.refused["one"]


# ---- made again ----


def test_cuts_nest_and_are_checked(tmp_path):
    network, x = lived_in("resnet", {"depth": 8}), pictures()
    once = pruning.removed(network, pruning.find_groups(network, x), {"stem.0": [0, 1, 2]}).eval()
    twice = pruning.removed(once, pruning.find_groups(once, x), {"stem.0": [5], "stages.1.0.conv1": [0]}).eval()
    assert twice.limbeck_config["args"]["of"]["ref"] == "cut:network"
    save_model(twice, tmp_path / "kept")
    assert torch.equal(load_model(tmp_path / "kept").eval()(x), twice(x))
    assert torch.equal(load_model(tmp_path / "kept", model=lived_in("resnet", {"depth": 8})).eval()(x), twice(x))
    note = json.loads((tmp_path / "kept" / "config.json").read_text())
    for change, what in [
        (lambda s: s.update({"nowhere": {"tensors": {}, "numbers": {}}}), "no module 'nowhere'"),
        (lambda s: s["stem.0"]["tensors"].update(weight=[99, 1, 3, 3]), "would become"),
        (lambda s: s["stem.0"]["tensors"].update(weight=[3]), "would become"),
        (lambda s: s["stem.0"]["numbers"].update(forward=3), "no number 'forward'"),
        (lambda s: s["stem.0"]["numbers"].update(out_channels="x"), "would be 'x'"),
        (lambda s: s.update({"stem.0": 7}), "not readable"),
    ]:
        changed = copy.deepcopy(note)
        change(changed["args"]["shapes"])
        (tmp_path / "kept" / "config.json").write_text(json.dumps(signed(changed)))
        with pytest.raises(UserError, match=what):
            load_model(tmp_path / "kept")


def test_a_cut_network_runs_no_code_of_its_folder(tmp_path):
    network, x = lived_in("mlp", {"widths": [8]}), pictures()
    smaller = pruning.removed(network, pruning.find_groups(network, x), {"stages.0.0": [0]})
    smaller.limbeck_config["args"]["of"] = {"ref": "python:os:getcwd", "args": {}}
    save_model(smaller, tmp_path / "kept")
    with pytest.raises(UserError, match="loading runs no code"):
        load_model(tmp_path / "kept")


def test_onnx(tmp_path):
    from limbeck.zoo.export import export_onnx

    network, x = lived_in("vit", {"depth": 1, "dim": 24}), pictures()
    groups = pruning.find_groups(network, x)
    smaller = pruning.removed(network, groups, {g.name: [0] for g in groups})
    assert export_onnx(smaller, x, tmp_path / "m.onnx", real_inputs=pictures(7))["max_abs_difference"] < 1e-4


def test_a_cut_network_learns_by_kd(tmp_path):
    network, x = lived_in("cnn", {"width": 6}), pictures()
    groups = pruning.find_groups(network, x)
    smaller = pruning.removed(network, groups, {g.name: [0, 1] for g in groups})
    options = {"data": "digits", "method": "kd", "steps": 4, "batch": 32, "baseline": False, "device": "cpu"}
    done = limbeck.distill(teacher=network, student=smaller, out=tmp_path / "run", **options)
    assert count_flops(load_model(tmp_path / "run" / "student"), x) == count_flops(smaller, x)
    assert not torch.equal(done.student.head.weight, smaller.head.weight)


# ---- what is chosen ----


def test_thresholds():
    """Against the definition, written here with a loop."""
    generator = torch.Generator().manual_seed(3)
    scores = {n: torch.rand(m, u, generator=generator) for n, m, u in [("a", 1, 10), ("b", 2, 8), ("c", 1, 20)]}
    kinds = {"a": 1, "b": 2, "c": 1}
    floor = {"a": 1, "b": 1, "c": 7}
    drops = pruning.group_thresholds(scores, 0.7, floor, kinds)
    for name, score in scores.items():
        pool = sorted(v for other, s in scores.items() if kinds[other] == kinds[name] for v in s.flatten().tolist())
        at = 0.7 * (len(pool) - 1)
        limit = pool[int(at)] + (at - int(at)) * (pool[int(at) + 1] - pool[int(at)])
        kept = {c for c in range(score.shape[1]) if max(score[:, c].tolist()) > limit}  # the union of the tied layers' masks
        kept |= set(sorted(range(score.shape[1]), key=lambda c: -max(score[:, c].tolist()))[: floor[name]])
        assert set(drops[name]) == set(range(score.shape[1])) - kept, name
    assert pruning.group_thresholds(scores, 0.0, floor, kinds) == {"a": [], "b": [], "c": []}
    everything = pruning.group_thresholds(scores, 1.0, floor, kinds)
    assert {n: scores[n].shape[1] - len(d) for n, d in everything.items()} == floor


def test_global_threshold_may_empty_a_layer_where_kinds_do_not():
    scores = {"small": torch.linspace(0.01, 0.1, 10)[None], "large": torch.linspace(1, 2, 10)[None]}
    assert len(pruning.global_threshold(scores, 0.5, {"small": 1, "large": 1})["small"]) == 9
    by_kind = pruning.group_thresholds(scores, 0.5, {"small": 1, "large": 1}, {"small": 0, "large": 1})
    assert {n: len(d) for n, d in by_kind.items()} == {"small": 5, "large": 5}


def test_scores():
    network, x = lived_in("resnet", {"depth": 8}), pictures()
    groups = pruning.find_groups(network, x)
    tied = next(g for g in groups if g.name == "stem.0")
    rows = {tuple(row) for row in pruning.scales(network, tied).tolist()}
    assert rows == {tuple(n.weight.abs().tolist()) for n in (network.stem[1], network.stages[0][0].norm2)}
    mlp = lived_in("mlp", {"widths": [5]})
    group = next(iter(pruning.find_groups(mlp, x)))
    first, head = mlp.stages[0][0], mlp.head
    length = (first.weight.square().sum(1) + first.bias.square() + head.weight.square().sum(0)).sqrt()
    assert torch.allclose(pruning.magnitude(mlp, group)[0], (length / length.mean()).detach(), atol=1e-6)
    labels = torch.arange(4)
    losses = [lambda: nn.functional.cross_entropy(mlp(x), labels), lambda: nn.functional.cross_entropy(mlp(2 * x), labels)]
    expected = torch.zeros(5)
    for loss in losses:
        mlp.zero_grad()
        loss().backward()
        for tensor, dim in ((first.weight, 1), (head.weight, 0)):
            expected += (tensor * tensor.grad).abs().sum(dim).detach() / 2
        expected += (first.bias * first.bias.grad).abs().detach() / 2
    mlp.zero_grad()
    assert torch.allclose(pruning.taylor(mlp, [group], losses)[group.name][0], expected, atol=1e-6)
    assert all(p.grad is None for p in mlp.parameters())


def test_constant_channels_move_into_the_next_bias():
    """A channel of scale 0 is relu(beta) everywhere: moved into the next bias or running mean the outputs stay (no padding)."""
    torch.manual_seed(0)
    for bias in (True, False):
        behind = [nn.Conv2d(6, 4, 3, bias=bias)] + ([] if bias else [nn.BatchNorm2d(4)])
        network = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *behind, nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
        ).eval()
        network[1].weight.data[[1, 4]] = 0
        network[1].bias.data = torch.tensor([0.1, 0.7, 0.2, -0.3, -0.9, 0.5])
        x = pictures()
        groups, drops = pruning.find_groups(network, x), {"0": [1, 4]}
        expected = network(x)
        plain = pruning.removed(network, groups, drops).eval()
        assert not torch.allclose(plain(x), expected, atol=1e-3)
        means, follows = pruning.mean_inputs(network, [x, pictures(3)])
        assert means["3"][1] == pytest.approx(0.7, abs=1e-6) and means["3"][4] == 0
        assert pruning.fold_means(network, groups, drops, means, follows) == []
        assert torch.allclose(pruning.removed(network, groups, drops).eval()(x), expected, atol=1e-5)


def test_what_can_be_moved_nowhere_is_named():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False), nn.Flatten(), nn.Linear(32, 10))
    groups = pruning.find_groups(network, pictures())
    assert pruning.fold_means(network, groups, {"0": [0]}, *pruning.mean_inputs(network, [pictures()])) == ["2"]


def test_sparse_rates():
    method = pruning.SparseTraining(rate=0.01, late=0.5, calm=0.1)
    gamma = torch.tensor([0.1, -0.9, 0.5, 0.7])
    assert method.rates(gamma, 0.49).tolist() == pytest.approx([0.01] * 4)
    assert method.rates(gamma, 0.75).tolist() == pytest.approx([0.01, 0.001, 0.01, 0.001])
    assert method.rates(gamma, 1.0).tolist() == pytest.approx([0.001] * 4)
    assert pruning.SparseTraining(rate=0.01, late=1.0).rates(gamma, 1.0).tolist() == pytest.approx([0.01] * 4)


# ---- the budget ----


def test_smallest_ratio():
    """Bisection on a made-up cost, and a budget out of reach."""
    calls = []

    def cost(network):
        calls.append(1)
        return {"params": network}

    def cut(ratio):
        return 1000 * (1 - 0.9 * ratio)

    found = pruning.smallest_ratio(cut, cost, Budget({"params": 400}), "this")
    assert 0 <= found - 2 / 3 < 1e-3 and len(calls) <= 13
    assert pruning.smallest_ratio(cut, cost, Budget({"params": 1000}), "this") == 0
    with pytest.raises(UserError, match="cannot be met by this: the smallest reachable model has 100 parameters"):
        pruning.smallest_ratio(cut, cost, Budget({"params": 99}), "this")


RECIPE = {
    "name": "slim-test",
    "teacher": {"model": "resnet", "args": {"depth": 8}, "train": {"steps": 30, "batch": 64, "lr": 0.01}},
    "student": {"model": "teacher"},
    "data": {"source": "digits", "train": 300},
    "training": {"steps": 12, "batch": 32, "lr": 0.01},
    "baseline": False,
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}


@pytest.mark.parametrize("method", [{"id": "gcp-sad", "beta": 10}, {"id": "global-pruning"}])
def test_methods_meet_the_budget(method, tmp_path):
    recipe = {**RECIPE, "method": method, "structure": {"budget": {"params": "30%", "flops": "60%"}}}
    done = limbeck.run_recipe(recipe, out=tmp_path / "run")
    used = done.summary["budget"]["used"]
    assert max(used.values()) <= 1 and max(used.values()) > 0.9
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    terms = {line["phase"]: set(line["terms"]) for line in lines if line.get("terms")}
    assert terms["student-sparse"] == {"hard", "sparsity"}
    assert terms["student"] == ({"hard", "attention"} if method["id"] == "gcp-sad" else {"hard"})
    again = load_model(tmp_path / "run" / "student")
    assert sum(p.numel() for p in again.parameters()) == done.summary["cost"]["student"]["params"]
    if method["id"] == "gcp-sad":  # the floor
        widths = [m.out_channels for m in build("resnet", input_shape=SHAPE, classes=10, depth=8).modules() if isinstance(m, nn.Conv2d)]
        left = [m.out_channels for m in again.modules() if isinstance(m, nn.Conv2d)]
        assert all(now >= 0.1 * before for now, before in zip(left, widths, strict=True))


def test_budget_out_of_reach(tmp_path):
    with pytest.raises(UserError, match=r"smallest reachable model has .* parameters"):
        limbeck.run_recipe(
            {**RECIPE, "method": {"id": "gcp-sad", "sparse": 0}, "structure": {"budget": {"params": 50}}}, out=tmp_path / "run"
        )


def test_kinds_of_layers_are_sizes_and_shortcuts(monkeypatch):
    network, x = lived_in("resnet", {"depth": 14}), pictures()
    groups = pruning.find_groups(network, x)
    seen = {}
    monkeypatch.setattr(pruning, "group_thresholds", lambda s, r, f, kinds: seen.update(kinds) or {})
    making = type("Making", (), {"example": type("Batch", (), {"inputs": x})})
    GCPSAD().choose(network, groups, {g.name: pruning.scales(network, g) for g in groups}, 0.5, making)
    assert seen["stages.0.0.conv1"] == seen["stages.0.1.conv1"] == ((8, 8), False)
    assert seen["stem.0"] == ((8, 8), True) and seen["stages.1.0.conv1"] == ((4, 4), False)


@pytest.mark.parametrize(
    "settings,network",
    [
        ({"score": "magnitude", "layers": 1}, ("mixer", {"depth": 2, "dim": 16})),
        ({"score": "taylor", "units": ["channels", "heads"], "layers": 1}, ("vit", {"depth": 3, "dim": 24})),
    ],
)
def test_global_pruning_without_batch_norm(settings, network, tmp_path):
    teacher = {"model": network[0], "args": network[1], "train": {"steps": 4, "batch": 32, "lr": 0.003}}
    recipe = {**RECIPE, "teacher": teacher, "method": {"id": "global-pruning", "ratio": 0.5, **settings}}
    recipe["training"] = {"steps": 2, "batch": 32, "lr": 0.003}
    done = limbeck.run_recipe(recipe, out=tmp_path / "run")
    assert done.summary["cost"]["student"]["params"] < 0.85 * done.summary["cost"]["teacher"]["params"]
    load_model(tmp_path / "run" / "student")


@pytest.mark.parametrize(
    "method,teacher,what",
    [
        ({"id": "gcp-sad"}, {"model": "mlp"}, "MLP has none"),
        ({"id": "global-pruning", "layers": 9}, {"model": "cnn"}, "layers is 9"),
        ({"id": "global-pruning", "units": ["neurons"]}, {"model": "cnn"}, "give channels, heads, or both"),
        ({"id": "gcp-sad", "sparse": 0}, {"model": "vit", "args": {"depth": 1, "dim": 24}}, "by the scales of norms"),
    ],
)
def test_refusals(method, teacher, what, tmp_path):
    recipe = {**RECIPE, "method": method, "teacher": {**teacher, "train": {"steps": 1, "batch": 32}}, "training": {"steps": 1, "batch": 32}}
    with pytest.raises(UserError) as error:
        limbeck.run_recipe(recipe, out=tmp_path / "run")
    assert what in str(error.value) or what in error.value.hint
