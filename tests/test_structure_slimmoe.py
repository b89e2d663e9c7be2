"""Mixtures of experts with thinner and with fewer experts: scores, cuts, the loss on the likeliest tokens, the whole job."""

import copy
import json

import pytest
import torch

import limbeck
from limbeck.errors import UserError
from limbeck.losses.vocabulary import Law, Sparse
from limbeck.structure import experts
from limbeck.structure.moe import likely_tokens
from limbeck.zoo import Tokens, build, load_model, save_model
from tests.conftest import TINY_TEXT

SIZES = {"layers": 2, "width": 16, "heads": 4, "inner": 24, "num_local_experts": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build("mixtral", tokens=Tokens(64, 16), **SIZES).eval()
    for parameter in made.parameters():  # larger than the usual first weights, so that experts matter
        parameter.data.mul_(4) if parameter.ndim > 1 else None
    return made


def ids(seed=0):
    return torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    logits = model(x).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten())


def test_scores_by_the_definition(model):
    """sum |theta dL/dtheta| over a neuron's gate row, up row and down column, written with plain indices; averaged over two batches."""
    layers = experts.mixture_layers(model)
    assert [layer.path for layer in layers] == ["model.layers.0", "model.layers.1"]
    found = experts.sensitivity(model, layers, [lambda: loss_of(model, ids(0)), lambda: loss_of(model, ids(1))])
    neurons, groups = torch.zeros(4, 24), torch.zeros(2)
    block = model.model.layers[1]
    for seed in (0, 1):
        model.zero_grad()
        loss_of(model, ids(seed)).backward()
        gated, down = block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj
        a, b = (gated * gated.grad).abs().detach(), (down * down.grad).abs().detach()
        for e in range(4):
            for i in range(24):
                neurons[e, i] += (a[e, i].sum() + a[e, 24 + i].sum() + b[e, :, i].sum()) / 2
        parts = {n: (p.weight * p.weight.grad).abs().detach() for n, p in block.self_attn.named_children() if n.endswith("_proj")}
        for g in range(2):  # heads of width 4; group g holds the query heads 2g and 2g + 1
            own = parts["q_proj"][8 * g : 8 * g + 8].sum() + parts["o_proj"][:, 8 * g : 8 * g + 8].sum()
            groups[g] += (own + parts["k_proj"][4 * g : 4 * g + 4].sum() + parts["v_proj"][4 * g : 4 * g + 4].sum()) / 2
    model.zero_grad()
    assert torch.allclose(found[1].neurons, neurons, rtol=1e-4, atol=1e-7)
    assert torch.allclose(found[1].groups, groups, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_routing_noise_is_off_while_scoring(model):
    noisy = copy.deepcopy(model).train()
    for block in noisy.model.layers:
        block.mlp.jitter_noise = 0.5
    layers = experts.mixture_layers(noisy)
    first, second = (experts.sensitivity(noisy, layers, [lambda: loss_of(noisy, ids())]) for _ in range(2))
    assert torch.equal(first[0].neurons, second[0].neurons) and noisy.training


def test_silent_neurons_go_without_a_trace(model, tmp_path):
    """Neurons whose down columns are 0, other ones in each expert; and attention groups whose output columns are 0."""
    quiet = copy.deepcopy(model)
    layers = experts.mixture_layers(quiet)
    keep, groups = [], []
    for number, block in enumerate(quiet.model.layers):
        rows = torch.stack(
            [torch.randperm(24, generator=torch.Generator().manual_seed(9 * number + e))[:8].sort().values for e in range(4)]
        )
        for e in range(4):
            gone = [i for i in range(24) if i not in rows[e].tolist()]
            block.mlp.experts.down_proj.data[e][:, gone] = 0
        block.self_attn.o_proj.weight.data[:, 8 * number : 8 * number + 8] = 0
        keep.append(rows)
        groups.append(torch.tensor([1 - number]))
    smaller = experts.thinner(quiet, layers, keep, groups).eval()
    assert torch.allclose(smaller(ids()).logits, quiet(ids()).logits, atol=1e-5)
    assert {tuple(b.mlp.experts.gate_up_proj.shape) for b in smaller.model.layers} == {(4, 16, 16)}
    assert (smaller.config.intermediate_size, smaller.config.num_key_value_heads, smaller.config.num_attention_heads) == (8, 1, 2)
    assert smaller.config.head_dim == 4 and quiet.config.intermediate_size == 24
    save_model(smaller, tmp_path / "kept")
    note = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert note["model_type"] == "mixtral" and note["intermediate_size"] == 8 and note["head_dim"] == 4
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "kept").eval()
    assert torch.equal(plain(ids()).logits, smaller(ids()).logits)
    assert torch.equal(load_model(tmp_path / "kept").eval()(ids()).logits, smaller(ids()).logits)


def test_neurons_are_ranked_inside_each_expert():
    scores = torch.tensor([[1.0, 5.0, 3.0, 2.0], [0.01, 0.02, 0.04, 0.03]])
    assert experts.highest(scores, 2).tolist() == [[1, 2], [2, 3]]


def test_fewer_experts(model):
    """Experts whose router row makes them never chosen can go: what the others are chosen for stays."""
    layers = experts.mixture_layers(model)
    smaller = experts.fewer_experts(model, layers, [torch.tensor([0, 2, 3]), torch.tensor([1, 2, 3])]).eval()
    assert smaller.config.num_local_experts == 3
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    block, cut = model.model.layers[1].mlp, smaller.model.layers[1].mlp
    scores = (x @ block.gate.weight.T).softmax(-1)[:, 1:]
    value, chosen = scores.topk(2, -1)
    value = value / value.sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for row in range(7):
        for weight, e in zip(value[row], chosen[row] + 1):
            gate, up = (block.experts.gate_up_proj[e] @ x[row]).chunk(2)
            expected[row] += weight * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    assert torch.allclose(cut(x[None])[0], expected, atol=1e-4)
    with pytest.raises(UserError, match="1 experts would stay, and 2 work"):
        experts.fewer_experts(model, layers, [torch.tensor([0])] * 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_without_experts_are_named(name):
    plain = build(name, tokens=Tokens(64, 16), layers=1, width=16, heads=2)
    with pytest.raises(UserError, match=f"{name}.*has no experts") as error:
        experts.mixture_layers(plain)
    assert "mixtral" in error.value.hint
    with pytest.raises(UserError, match="no model of transformers"):
        experts.mixture_layers(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen2Moe", "Olmoe", "Phimoe"])
def test_other_mixtures(kind):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    width = {"intermediate_size": 24, "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **width, shared_expert_intermediate_size=8, pad_token_id=0)
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    layers = experts.mixture_layers(made)
    scores = experts.sensitivity(made, layers, [lambda: loss_of(made, ids())])
    keep = [experts.highest(s.neurons, 8) for s in scores]
    own = made.model.layers[0].mlp.experts
    for e in range(4):
        own.down_proj.data[e][:, [i for i in range(24) if i not in keep[0][e].tolist()]] = 0
    smaller = experts.thinner(made, layers, keep).eval()
    assert torch.allclose(smaller(ids()).logits, made(ids()).logits, atol=1e-5)
    if kind == "Olmoe":
        with pytest.raises(UserError, match="normalises all heads together"):
            experts.thinner(made, layers, keep, [torch.tensor([0])])


# ---- the loss ----


def laws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 20, generator=generator, requires_grad=True), 2 * torch.randn(6, 20, generator=generator)


def test_likely_tokens_by_the_definition():
    """-sum over the teacher's 8 likeliest of p log q, p not renormalised; value and gradient; live and stored teacher."""
    own, other = laws()
    p = other.softmax(-1)
    top = p.topk(8, -1)
    expected = -(top.values * own.log_softmax(-1).gather(1, top.indices)).sum(-1).mean()
    bucket = expected - ((1 - top.values.sum(-1)) * (1 - own.softmax(-1).gather(1, top.indices).sum(-1)).log()).mean()
    for rest, value in (("drop", expected), ("bucket", bucket)):
        (slope,) = torch.autograd.grad(value, own, retain_graph=True)
        stored = Sparse(p.topk(11, -1).indices, p.topk(11, -1).values.log(), 20)
        for teacher in (Law(dense=other), stored):
            got = likely_tokens(Law(dense=own), teacher, 8, rest)
            assert torch.allclose(got, value, atol=1e-5)
            assert torch.allclose(torch.autograd.grad(got, own)[0], slope, atol=1e-6)
    whole = likely_tokens(Law(dense=own), Law(dense=other), 50, "bucket")
    assert torch.allclose(whole, -(p * own.log_softmax(-1)).sum(-1).mean(), atol=1e-5)


def test_without_a_bucket_the_best_student_never_says_the_other_tokens():
    """At q = p the gradient of "bucket" is 0, that of "drop" is q_v p_K - p_v [v in K]."""
    _, other = laws()
    own = other.clone().requires_grad_()
    (at_teacher,) = torch.autograd.grad(likely_tokens(Law(dense=own), Law(dense=other), 8, "bucket"), own)
    assert at_teacher.abs().max() < 1e-6
    (drop,) = torch.autograd.grad(likely_tokens(Law(dense=own), Law(dense=other), 8, "drop"), own)
    p = other.softmax(-1)
    inside = torch.zeros_like(p).scatter(1, p.topk(8, -1).indices, 1.0)
    assert torch.allclose(drop, (p * (p * inside).sum(-1, keepdim=True) - p * inside) / 6, atol=1e-6)


def test_balance_loss(model):
    """E sum_e f_e P_e over tokens that are there; top_k when all experts are used alike."""
    layers = experts.mixture_layers(model)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:] = 0
    with experts.router_logits(model, layers) as routed:
        model(ids())
    assert [tuple(r.shape) for r in routed] == [(30, 4), (30, 4)]
    rows = torch.cat([r[mask.flatten().bool()] for r in routed])
    p = rows.softmax(-1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(2, -1).indices, 1.0)
    expected = 4 * (chosen.mean(0) * p.mean(0)).sum()
    assert torch.allclose(experts.balance_loss(routed, 2, mask), expected, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


# ---- the job ----

RECIPE = {
    **TINY_TEXT,
    "teacher": {"model": "mixtral", "args": SIZES, "train": {"steps": 10, "batch": 8, "lr": 0.01}},
    "student": {"model": "teacher"},
    "training": {"steps": 4, "batch": 8, "lr": 0.003},
    "baseline": False,
}


def test_two_stages(tmp_path):
    """24 -> 16 -> 8 neurons, the teacher stays the whole model; a plain folder comes out."""
    stages = [{"name": f"to-{w}", "method": {"id": "slimmoe", "width": w, "calibration": 2, "groups": 1 if w == 8 else 0}} for w in (16, 8)]
    done = limbeck.run_recipe({**RECIPE, "method": {"id": "slimmoe"}, "stages": stages}, out=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert config["intermediate_size"] == 8 and config["num_local_experts"] == 4 and config["num_key_value_heads"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    terms = {line["phase"]: set(line["terms"]) for line in lines if line.get("terms")}
    assert terms["to-16"] == terms["to-8"] == {"likely", "balance"}
    cost = done.summary["cost"]
    assert cost["student"]["params"] < cost["teacher"]["params"] and cost["student"]["flops"] < cost["teacher"]["flops"]


@pytest.mark.parametrize("method,key", [("slimmoe", "intermediate_size"), ("expert-dropping", "num_local_experts")])
def test_budget(method, key, tmp_path):
    recipe = {**RECIPE, "method": {"id": method, "calibration": 1}, "structure": {"budget": {"params": "75%"}}}
    done = limbeck.run_recipe(recipe, out=tmp_path / "run")
    used = done.summary["budget"]["used"]["params"]
    assert used <= 1 and (used > 0.8 or method == "expert-dropping")
    assert (
        json.loads((tmp_path / "run" / "student" / "config.json").read_text())[key] < {"intermediate_size": 24, "num_local_experts": 4}[key]
    )


@pytest.mark.parametrize(
    "method,what",
    [
        ({"id": "slimmoe", "width": 32}, "width is 32, and the model has 24"),
        ({"id": "slimmoe", "width": 12}, "width is 12, and widths go in steps of 8"),
        ({"id": "slimmoe", "groups": 3}, "groups is 3, and the model has 2"),
        ({"id": "expert-dropping", "keep": 1}, "keep is 1"),
    ],
)
def test_refusals(method, what, tmp_path):
    with pytest.raises(UserError, match=what):
        limbeck.run_recipe({**RECIPE, "method": {"calibration": 1, **method}}, out=tmp_path / "run")
