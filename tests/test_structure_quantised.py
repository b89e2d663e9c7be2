"""Quantised weights: mathematics against formulas written here, packing, folding, files, methods, evidence of what is stored."""

from __future__ import annotations

import copy
import doctest
import heapq
import itertools
import math

import pytest
import torch
from torch import nn

from limbeck import zoo
from limbeck.errors import UserError
from limbeck.evaluation.cost import cost, stored_bytes
from limbeck.tasks import Classification
from limbeck.zoo import quantised as q
from limbeck.zoo.language import Tokens
from limbeck.zoo.quantised import grid, packing, scheme, size

torch.set_num_threads(1)

SCHEMES = {
    "bucket": q.Scheme(levels=4, group=16),
    "symmetric": q.Scheme(levels=7, symmetric=True),
    "tensor": q.Scheme(levels=8, group="tensor"),
    "odd": q.Scheme(levels=5, group=10, backward="complicated"),
    "learned": q.Scheme(levels=6, group=32, learned=True),
    "inputs": q.Scheme(levels=15, symmetric=True, activations=8),
    "truncated": q.Scheme(levels=256, backward="truncated"),
}
LM = Tokens(60, 16, "causal-lm", 0, 1, 2)


def network(kind):
    torch.manual_seed(0)
    if kind in ("llama", "gpt2"):
        return zoo.build(kind, tokens=LM, layers=1, width=16, heads=2), torch.randint(0, 60, (2, 7))
    if kind == "sentence":
        tokens = Tokens(60, 16, "embedding", 0, 1, 2)
        return zoo.build("bert", tokens=tokens, layers=1, width=16, heads=2), torch.randint(0, 60, (2, 7))
    args = {"vit": {"depth": 1, "dim": 16, "heads": 2}, "mlp": {"widths": [12]}}.get(kind, {})
    return zoo.build(kind, input_shape=(1, 8, 8), classes=5, **args), torch.randn(3, 1, 8, 8)


def said(model, x):
    with torch.no_grad():
        out = model.eval()(x)
    return out.logits if hasattr(out, "logits") else out


# ---- the mathematics ----


def plain(w, levels, bucket):
    """Equation (1) of the paper, value by value."""
    flat, out = w.flatten().tolist(), []
    for start in range(0, len(flat), bucket):
        part = flat[start : start + bucket]
        low, high = min(part), max(part)
        alpha = high - low if high - low >= 1e-10 else 1.0
        out += [round((x - low) / alpha * (levels - 1)) / (levels - 1) * alpha + low for x in part]
    return torch.tensor(out, dtype=w.dtype).reshape(w.shape)


@pytest.mark.parametrize(("levels", "bucket", "count"), [(4, 16, 64), (2, 5, 13), (16, 256, 40), (7, 8, 65)])
def test_affine_buckets_against_a_loop(levels, bucket, count):
    torch.manual_seed(count)
    w = torch.randn(count, dtype=torch.float64)
    got = q.fake(w, q.Scheme(levels=levels, group=bucket))
    assert torch.allclose(got, plain(w, levels, bucket), atol=1e-6)


def test_symmetric_channels_against_the_formula():
    w = torch.randn(5, 3, 2, 2)
    s = w.abs().amax((1, 2, 3), keepdim=True) / 3
    assert torch.allclose(q.fake(w, q.Scheme.of_bits(3, symmetric=True)), (w / s).round() * s)
    # the output channels of transformers' Conv1D are columns
    t = w.flatten(1).T.contiguous()
    assert torch.equal(q.fake(t, q.Scheme.of_bits(3, symmetric=True), axis=1).T, q.fake(w.flatten(1), q.Scheme.of_bits(3, symmetric=True)))


def test_constant_groups_stay_as_they_are():
    w = torch.full((2, 8), 0.3)
    for one in (q.Scheme(levels=4), q.Scheme(levels=4, learned=True)):
        points = grid.first_points(w, one) if one.learned else None
        assert torch.allclose(q.fake(w, one, points=points), w)
    assert torch.equal(q.fake(torch.zeros(2, 8), q.Scheme(levels=3, symmetric=True)), torch.zeros(2, 8))


def test_learned_points_nearest_and_ties_go_up():
    points = torch.tensor([0.0, 0.5, 1.0])
    w = torch.tensor([0.0, 0.2, 0.25, 0.74, 0.75, 1.0])
    got = q.fake(w, q.Scheme(levels=3, group="tensor", learned=True), points=points)
    assert got.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    first = grid.first_points(torch.arange(11.0), q.Scheme(levels=3, group="tensor", learned=True))
    assert torch.allclose(first, torch.tensor([0.0, 0.5, 1.0]))
    skewed = torch.randn(500).exp()
    expected = torch.quantile((skewed - skewed.min()) / (skewed.max() - skewed.min()), torch.linspace(0, 1, 7))
    assert torch.allclose(grid.first_points(skewed, q.Scheme(levels=7, group="tensor", learned=True)), expected, atol=1e-5)


def rounding(x):
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("symmetric", [False, True])
def test_complicated_gradient_is_that_of_an_independent_formula(symmetric):
    """Rounding straight through, the scale by autograd."""
    torch.manual_seed(0)
    w = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 7, dtype=torch.float64)
    levels = 7
    (own,) = torch.autograd.grad((q.fake(w, q.Scheme(levels=levels, symmetric=symmetric, backward="complicated")) * g).sum(), w)
    if symmetric:
        s = w.abs().max(1, keepdim=True).values / 3
        formula = rounding(w / s) * s
    else:
        low, high = w.min(1, keepdim=True).values, w.max(1, keepdim=True).values
        formula = rounding((w - low) / (high - low) * (levels - 1)) / (levels - 1) * (high - low) + low
    (expected,) = torch.autograd.grad((formula * g).sum(), w)
    assert torch.allclose(own, expected, atol=1e-6)
    (straight,) = torch.autograd.grad((q.fake(w, q.Scheme(levels=levels, symmetric=symmetric)) * g).sum(), w)
    assert torch.equal(straight, g) and not torch.allclose(own, g)


def test_complicated_gradient_of_a_padded_bucket():
    """The padding of the last bucket, copies of a value that is no extreme, takes no gradient and gives none."""
    torch.manual_seed(0)
    w = torch.cat([torch.randn(7), torch.tensor([0.0, 1.0, 0.4])]).double().requires_grad_()
    g = torch.randn(10, dtype=torch.float64)
    (own,) = torch.autograd.grad((q.fake(w, q.Scheme(levels=4, group=7, backward="complicated")) * g).sum(), w)
    tail = w[7:].detach().requires_grad_()
    (alone,) = torch.autograd.grad((q.fake(tail, q.Scheme(levels=4, group="tensor", backward="complicated")) * g[7:]).sum(), tail)
    assert torch.allclose(own[7:], alone)


def test_scale_gradient_against_finite_differences():
    """With codes that do not change, the quantised weights move with the greatest and least value as the gradient says."""
    w = torch.tensor([0.0, 0.31, 0.72, 1.0], dtype=torch.float64)
    one = q.Scheme(levels=4, group="tensor", backward="complicated")
    for place, through in ((3, w[1:3]), (0, 1 - w[1:3])):
        x = w.clone().requires_grad_()
        own = torch.stack([torch.autograd.grad(q.fake(x, one)[i], x)[0][place] for i in (1, 2)])
        step = torch.zeros_like(w)
        step[place] = 1e-4
        moved = (q.fake(w + step, one) - q.fake(w - step, one))[1:3] / 2e-4
        # the straight-through part: what v = (w - low) / (high - low) loses as the scale grows
        assert torch.allclose(own, moved - through, atol=1e-4)


def test_truncated_gradient_and_clipping():
    w = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.7, 1.5], requires_grad=True)
    one = q.Scheme(levels=5, group="tensor", backward="truncated")
    out = q.fake(w, one)
    assert out.min() == -1 and out.max() == 1
    (g,) = torch.autograd.grad(out.sum(), w)
    assert g.tolist() == [0, 1, 1, 1, 1, 0]


def test_gradient_of_points_is_the_sum_over_their_weights_times_alpha():
    w = torch.randn(40)
    one = q.Scheme(levels=4, group=16, learned=True)
    points = grid.first_points(w, one).requires_grad_()
    g = torch.randn(40)
    (own,) = torch.autograd.grad((q.fake(w, one, points=points) * g).sum(), points)
    expected = torch.zeros(4)
    for start in range(0, 40, 16):
        part = w[start : start + 16]
        alpha = part.max() - part.min()
        v = (part - part.min()) / alpha
        for value, pull in zip(v, g[start : start + 16]):
            distance = (points.detach() - value).abs()
            expected[int(distance.argmin())] += alpha * pull
    assert torch.allclose(own, expected, atol=1e-5)


def test_stochastic_rounding_is_unbiased_and_only_in_training():
    torch.manual_seed(0)
    w = torch.tensor([0.0, 0.3, 1.0])
    mean = torch.stack([q.fake(w, q.Scheme(levels=3, group="tensor"), stochastic=True) for _ in range(4000)]).mean(0)
    assert torch.allclose(mean, w, atol=0.02)
    layer = nn.Linear(50, 4)
    model = nn.Sequential(layer)
    q.quantise(model, q.Scheme(levels=3, rounding="stochastic"))
    assert not torch.equal(layer.weight, layer.weight)
    model.eval()
    assert torch.equal(layer.weight, layer.weight)


def test_clipping_lowers_the_error_and_stops_the_gradient_outside():
    torch.manual_seed(0)
    w = torch.randn(4, 200)
    w[:, 0] = 12.0
    for one in (q.Scheme.of_bits(3, symmetric=True), q.Scheme(levels=8)):
        clip = q.best_clip(w, one)
        assert (clip < 1).all()
        assert ((q.fake(w, one, clip=clip) - w) ** 2).sum() < ((q.fake(w, one) - w) ** 2).sum()
        x = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(q.fake(x, one, clip=clip).sum(), x)
        assert (g[:, 0] == 0).all() and g.sum() > 100
        inside = w.clamp(-0.1, 0.1)
        assert torch.equal(torch.autograd.grad(q.fake(x2 := inside.requires_grad_(), one).sum(), x2)[0], torch.ones_like(w))


def test_inputs_by_token_and_by_sample():
    x = torch.randn(2, 3, 8)
    s = x.abs().amax(-1, keepdim=True) / 127
    assert torch.allclose(q.fake_activations(x, 8), (x / s).round() * s)
    s = x.abs().amax((1, 2), keepdim=True) / 7
    assert torch.allclose(q.fake_activations(x, 4, tokens=False), (x / s).round() * s, atol=1e-6)
    x.requires_grad_()
    assert torch.equal(torch.autograd.grad(q.fake_activations(x, 4).sum(), x)[0], torch.ones_like(x))


# ---- codes in bytes ----


@pytest.mark.parametrize(("bits", "count"), itertools.product((1, 2, 3, 4, 5, 6, 7, 8), (1, 7, 8, 50)))
def test_packing_round_trip_and_size(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = q.pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == q.packed_bytes(count, bits) == math.ceil(count / 8) * bits
    assert torch.equal(q.unpack(packed, bits, count), codes)


def test_huffman_against_the_textbook():
    counts = [5, 9, 12, 13, 16, 45]
    heap = [(c, i, [i]) for i, c in enumerate(counts)]
    depth = dict.fromkeys(range(6), 0)
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, x), (b, _, y) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in x + y:
            depth[symbol] += 1
        heapq.heappush(heap, (a + b, i, x + y))
    assert q.huffman_length(counts) == pytest.approx(sum(c * depth[i] for i, c in enumerate(counts)) / 100)
    assert q.huffman_length([7, 0]) == 0 and q.huffman_length([1] * 8) == 3


def test_levels_are_shared_out_by_gradient():
    found = q.share_levels({"a": 8.0, "b": 1.0, "c": 1.0}, 16)
    assert sum(found.values()) == 48 and found["a"] == 27 and found["a"] > found["b"]
    assert q.share_levels({"a": 0.0, "b": 0.0}, 4) == {"a": 4, "b": 4}
    extreme = q.share_levels({"a": 1.0, **{f"x{i}": 0.0 for i in range(9)}}, 2)
    assert min(extreme.values()) >= 2
    assert max(q.share_levels({"a": 1.0, "b": 0.0}, 256).values()) == 256


@pytest.mark.parametrize("module", [scheme, packing, size])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


# ---- networks ----


@pytest.mark.parametrize(("kind", "name"), [*itertools.product(("mlp", "cnn"), SCHEMES), ("vit", "bucket"), ("llama", "symmetric"),
                                            ("gpt2", "learned"), ("gpt2", "symmetric"), ("sentence", "inputs")])  # fmt: skip
def test_fold_save_and_open_keep_every_bit(kind, name, tmp_path):
    """Fake-quantised, folded and reopened networks say the same; the file holds packed codes and is as small as the closed form says."""
    model, x = network(kind)
    before = zoo.parameters(model)
    plain_output = said(copy.deepcopy(model), x)
    q.quantise(model, SCHEMES[name])
    copied = copy.deepcopy(model)
    expected = said(model, x)
    assert not torch.allclose(expected, plain_output, atol=1e-6)
    q.fold(model)
    assert torch.equal(said(model, x), expected)
    assert torch.equal(said(copied, x), expected), "folding one copy changed the other"
    assert zoo.parameters(model) == before and not any(p.ndim > 1 for p in model.parameters() if kind != "vit")
    zoo.save_model(model, tmp_path)
    again = zoo.load_model(tmp_path)
    assert torch.equal(said(again, x), expected) and zoo.parameters(again) == before
    counted = q.size_of(model)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert counted.total == stored_bytes(model) == stored_bytes(again) <= file < counted.total + 20_000
    assert torch.allclose(said(q.unfold(again), x), expected, atol=1e-5)
    assert zoo.parameters(again) >= before and q.quantisable(again) and not q.is_coded(again)


def test_size_against_the_closed_form(tmp_path):
    model = zoo.build("mlp", input_shape=(1, 8, 8), classes=5, widths=[12])
    q.quantise(model, q.Scheme(levels=4, group=256))
    q.fold(model)
    found = q.size_of(model)
    weights = 64 * 12 + 12 * 5
    buckets = 64 * 12 // 256 + 1
    # a layer smaller than a bucket has one group of its own size, without padding
    assert found.weights == weights and found.codes == 64 * 12 * 2 // 8 + math.ceil(60 / 8) * 2
    assert found.scales == buckets * 2 * 4 and found.rest == sum(p.numel() * 4 for p in model.parameters())
    assert found.bits == pytest.approx((found.codes + found.scales) * 8 / weights)
    assert 0 < found.huffman_bits <= 2
    assert q.describe(model)["code_bytes"] == found.codes
    figures = cost(model, torch.randn(2, 1, 8, 8), repeats=1, warmup=0)
    assert figures.params == weights + 12 + 5 and figures.bytes == found.total


def test_tied_weights_share_codes_and_train_together():
    model, _ = network("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    q.quantise(model, SCHEMES["learned"])
    assert q.full_weight(model.lm_head) is q.full_weight(model.model.embed_tokens)
    assert q.fake_of(model.lm_head) is q.fake_of(model.model.embed_tokens)
    q.fold(model)
    assert model.lm_head.coded is model.model.embed_tokens.coded
    assert model.limbeck_config["args"]["layers"]["lm_head"] == {"same_as": "model.embed_tokens"}
    assert isinstance(model.lm_head, nn.Linear)


def test_gradient_goes_to_the_full_precision_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    x, w = torch.randn(5, 6), model[0].weight.detach().clone()
    q.quantise(model, q.Scheme(levels=4, group="tensor"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantised_w = plain(w, 4, 24)
    model(x).square().sum().backward()
    g = 2 * (x @ quantised_w.T + model[0].bias.detach()).T @ x
    optimizer.step()
    assert torch.allclose(q.full_weight(model[0]), w - 0.1 * g, atol=1e-5)


def test_ends_and_named_layers():
    model, _ = network("mlp")
    model = zoo.build("mlp", input_shape=(1, 8, 8), classes=5, widths=[12, 12])
    names = list(q.quantisable(model))
    q.quantise(a := copy.deepcopy(model), q.Scheme(levels=4), ends="8bit")
    assert [f.scheme.levels for _, _, f in q.fakes(a)] == [256, 4, 256]
    q.quantise(a := copy.deepcopy(model), q.Scheme(levels=4), ends="full")
    assert [name for name, _, _ in q.fakes(a)] == names[1:-1]
    q.quantise(a := copy.deepcopy(model), q.Scheme(levels=4), layers=[names[1]], levels={names[1]: 9})
    assert [(name, f.scheme.levels) for name, _, f in q.fakes(a)] == [(names[1], 9)]
    with pytest.raises(UserError, match="quantised already"):
        q.quantise(a, q.Scheme())
    lm, _ = network("gpt2")
    q.quantise(lm, q.Scheme(levels=4), ends="8bit")
    held = {name: f.scheme.levels for name, _, f in q.fakes(lm)}
    assert held["transformer.wte"] == held["lm_head"] == held["transformer.wpe"] == 256 and held["transformer.h.0.attn.c_attn"] == 4


def test_layers_without_a_quantised_form_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    assert "1 (GRU)" in q.quantise(model, q.Scheme())[0]
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    with pytest.raises(UserError, match="GRU, which has no quantised form"):
        q.quantise(model, q.Scheme(), layers=["1"])
    with pytest.raises(UserError, match="unknown layer '0x'"):
        q.quantise(model, q.Scheme(), layers=["0x"])
    with pytest.raises(UserError, match="no layer that can be quantised"):
        q.quantise(nn.ReLU(), q.Scheme())
    with pytest.raises(UserError, match="no quantised layer to fold"):
        q.fold(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "wrong",
    [{"levels": 1}, {"levels": 257}, {"levels": 4, "symmetric": True}, {"group": "row"}, {"group": 1}, {"rounding": "up"},
     {"backward": "exact"}, {"levels": 5, "symmetric": True, "learned": True}, {"activations": 1}],
)  # fmt: skip
def test_schemes_that_cannot_be(wrong):
    with pytest.raises(UserError):
        q.Scheme(**wrong)


def test_bits_and_levels():
    assert q.Scheme.of_bits(3).levels == 8 and q.Scheme.of_bits(3, symmetric=True).levels == 7 and q.Scheme(levels=5).bits == 3
    assert q.Scheme(levels=5, symmetric=True).with_levels(8).levels == 7
    for bits, settings in ((0, {}), (9, {}), (1, {"symmetric": True})):
        with pytest.raises(UserError):
            q.Scheme.of_bits(bits, **settings)


def test_a_torn_note_is_refused(tmp_path):
    import json

    from limbeck.zoo.files import signed

    model, _ = network("mlp")
    q.quantise(model, SCHEMES["bucket"])
    zoo.save_model(q.fold(model), tmp_path)
    path = tmp_path / "config.json"
    note = json.loads(path.read_text())
    layers = note["args"]["layers"]
    for broken in ({**layers, "nobody": next(iter(layers.values()))}, {n: {"levels": 4, "odd": 1} for n in layers}):
        path.write_text(json.dumps(signed({**note, "args": {**note["args"], "layers": broken}})))
        with pytest.raises(UserError):
            zoo.load_model(tmp_path)
    path.write_text(json.dumps(signed({**note, "args": {**note["args"], "of": {"ref": "python:os:getcwd", "args": {}}}})))
    with pytest.raises(UserError, match="runs no code"):
        zoo.load_model(tmp_path)


def test_a_network_of_ones_own_is_opened_with_itself(tmp_path):
    def own():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    model = own()
    q.quantise(model, SCHEMES["bucket"])
    x = torch.randn(2, 1, 8, 8)
    expected = said(q.fold(model), x)
    zoo.save_model(model, tmp_path)
    with pytest.raises(UserError, match="cannot be made again by limbeck alone"):
        zoo.load_model(tmp_path)
    again = zoo.load_model(tmp_path, model=own())
    assert torch.equal(said(again, x), expected) and again.limbeck_config == model.limbeck_config
    with pytest.raises(UserError, match="no such layer"):
        zoo.load_model(tmp_path, model=nn.Sequential(nn.ReLU()))


def test_onnx_of_a_folded_network(tmp_path):
    pytest.importorskip("onnxruntime")
    from limbeck.zoo.export import export_onnx

    for kind, name in (("cnn", "bucket"), ("mlp", "inputs")):
        model, x = network(kind)
        q.quantise(model, SCHEMES[name])
        q.fold(model)
        expected = said(model, x)
        found = export_onnx(model, x, tmp_path / f"{kind}.onnx", real_inputs=x)
        assert found["max_abs_difference"] < 1e-4 and torch.equal(said(model, x), expected) and q.is_coded(model)


def test_a_cut_network_nests(tmp_path):
    from limbeck.zoo.cut import mark_cut

    model = zoo.build("mlp", input_shape=(1, 8, 8), classes=5, widths=[12])
    smaller = copy.deepcopy(model)
    first, last = (m for m in smaller.modules() if isinstance(m, nn.Linear))
    first.weight, first.bias, first.out_features = nn.Parameter(first.weight[:7]), nn.Parameter(first.bias[:7]), 7
    last.weight, last.in_features = nn.Parameter(last.weight[:, :7]), 7
    mark_cut(model, smaller)
    q.quantise(smaller, SCHEMES["bucket"])
    x = torch.randn(2, 1, 8, 8)
    expected = said(q.fold(smaller), x)
    zoo.save_model(smaller, tmp_path)
    assert torch.equal(said(zoo.load_model(tmp_path), x), expected)


# ---- methods ----


def method_of(**settings):
    from limbeck.method import make

    made = make("quantized-distillation", settings)
    made.task, made.complete = Classification(tuple("abc")), True
    return made


def loss_of(student, teacher, labels, **settings):
    from limbeck.data.batch import Batch
    from limbeck.engine.clock import Clock
    from limbeck.signals.signals import Signals

    return method_of(**settings).loss(Batch(None, labels), Signals(logits=student), Signals(logits=teacher), Clock(0, 1, 1))


def test_the_loss_is_the_papers():
    """The teacher's term is a mean over samples times classes, as torch's KLDivLoss(reduction="mean") gives it."""
    s, t, y = torch.randn(6, 3), torch.randn(6, 3), torch.randint(0, 3, (6,))
    found = loss_of(s, t, y)
    reference = nn.KLDivLoss(reduction="none")((s / 2).log_softmax(1), (t / 2).softmax(1)).mean()
    assert torch.allclose(found["kl"], 0.7 * 4 * reference) and torch.allclose(found["ce"], 0.3 * nn.functional.cross_entropy(s, y))
    whole = loss_of(s, t, y, reduction="batch")
    assert torch.allclose(whole["kl"], 3 * found["kl"])


def test_who_asks_the_teacher():
    s = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 9.0, 0], [0.0, 0, 9]])
    t, y = torch.randn(4, 3), torch.tensor([0, 0, 0, -1])

    def expected(asked):
        kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
        ce = torch.stack([-s.log_softmax(1)[i, y[i]] if y[i] >= 0 else torch.tensor(0.0) for i in range(4)])
        asked = torch.tensor(asked)
        return 0.7 * (asked * kl).mean() / 3, ((1 - 0.7 * asked) * ce).sum() / 3

    for ask, asked in (("wrong", [0.0, 0, 1, 1]), ("entropy", [0.0, 1, 0, 1])):
        found = loss_of(s, t, y, ask=ask, temperature=1.0)
        kl, ce = expected(asked)
        assert torch.allclose(found["kl"], kl) and torch.allclose(found["ce"], ce), ask
    torch.manual_seed(0)
    s = torch.tensor([[2.0, 0, 0]]).repeat(3000, 1)
    share = method_of(ask="chance")._asked(s, torch.zeros(3000).long()).mean()
    p = s[0].softmax(0)
    assert share == pytest.approx(float(-(p * p.log()).sum() / math.log(3)), abs=0.03)


def run(tiny, tmp_path, **changes):
    """The job alone, without its report."""
    from limbeck import recipe
    from limbeck.engine.session import Session
    from limbeck.structure import job

    tmp_path.mkdir(exist_ok=True)
    made = job.run(recipe.resolve({"baseline": False, **copy.deepcopy(tiny), **changes}), Session(folder=tmp_path), {})
    zoo.save_model(made.artifacts["student"], tmp_path / "student")
    return made


@pytest.mark.parametrize(
    "settings",
    [{"mode": "weights"}, {"mode": "points", "guide": "itself"}, {"mode": "alternate", "points_lr": 0.001, "allocate": True}],
)
def test_a_whole_run(tiny, tmp_path, settings):
    """The student is packed, small on disk, and the modes train what they should."""
    student = {"model": "mlp", "args": {"widths": [24]}, "train": {"steps": 60, "lr": 0.01}}
    method = {"id": "quantized-distillation", "bits": 3, "bucket": 32, **settings}
    result = run(tiny, tmp_path, student=student, method=method)
    costs, metrics = result.summary["cost"], result.summary["metrics"]
    assert metrics["student"]["accuracy"] > 0.5
    network = zoo.load_model(tmp_path / "student")
    assert q.is_coded(network) and costs["student"]["bytes"] == q.size_of(network).total
    assert costs["student"]["params"] == zoo.parameters(zoo.build("mlp", input_shape=(1, 8, 8), classes=10, widths=[24]))
    assert costs["student"]["bytes"] < 4 * costs["student"]["params"] / 3
    levels = [layer.coded.scheme.levels for _, layer in q.coded_layers(network)]
    assert sum(levels) == 16 and (len(set(levels)) == 2) == bool(settings.get("allocate"))
    assert 2 < metrics["student"]["huffman_bits"] < metrics["student"]["bits"] < 8


def test_points_alone_move_in_the_mode_points():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    q.quantise(model, q.Scheme(levels=4, group="tensor", learned=True))
    before = q.fake_of(model[0]).points.detach().clone()
    q.fake_of(model[0]).points.data = before[[1, 0, 2, 3]]
    assert torch.equal(q.fake_of(model[0]).levels(), before)
    unsorted = model[0].weight.detach()
    q.fake_of(model[0]).points.data = before
    assert torch.equal(model[0].weight, unsorted)


def test_turns_of_the_mode_alternate_end_on_weights():
    from limbeck.engine.clock import Clock

    made = method_of(mode="alternate")
    assert [made.turns(Clock(step, 4, 10))[0] for step in (0, 3, 4, 7, 8, 9)] == ["student"] * 2 + ["points"] * 2 + ["student"] * 2


def test_bits_from_the_budget(tiny, tmp_path):
    student = {"model": "mlp", "args": {"widths": [24]}, "train": {"steps": 60, "lr": 0.01}}
    method = {"id": "quantised", "train": False}
    result = run(tiny, tmp_path, student=student, method=method, structure={"budget": {"bits": 6.5}})
    network = zoo.load_model(tmp_path / "student")
    bits = {layer.coded.scheme.bits for _, layer in q.coded_layers(network)}
    cost = result.summary["cost"]["student"]
    assert len(bits) == 1 and 8 * cost["bytes"] / cost["params"] <= 6.5
    more = zoo.build("mlp", input_shape=(1, 8, 8), classes=10, widths=[24])
    q.quantise(more, q.Scheme.of_bits(bits.pop() + 1))
    assert 8 * stored_bytes(q.fold(more)) / cost["params"] > 6.5
    run(tiny, tmp_path / "wide", student=student, method=method, structure={"budget": {"bits": 40}})
    assert {layer.coded.scheme.bits for _, layer in q.coded_layers(zoo.load_model(tmp_path / "wide" / "student"))} == {8}
    with pytest.raises(UserError, match="cannot be met by weights of 1 bits"):
        run(tiny, tmp_path / "no", student=student, method=method, structure={"budget": {"bits": 0.5}})


def test_rounding_alone_changes_nothing_else(tiny, tmp_path):
    """With `train: false` the student is the start, rounded and clipped."""
    student = {"model": "mlp", "args": {"widths": [24]}, "train": {"steps": 60, "lr": 0.01}}
    result = run(tiny, tmp_path, student=student, method={"id": "quantised", "bits": 2, "train": False, "symmetric": True})
    eight = run(tiny, tmp_path / "b", student=student, method={"id": "quantised", "bits": 8, "train": False})
    assert eight.summary["metrics"]["student"]["accuracy"] >= result.summary["metrics"]["student"]["accuracy"]


def test_settings_that_do_not_go_together(tiny, tmp_path):
    with pytest.raises(UserError, match="evenly spaced"):
        run(tiny, tmp_path, method={"id": "quantized-distillation", "mode": "points", "backward": "complicated"})
    with pytest.raises(UserError, match="bits is 9"):
        run(tiny, tmp_path / "b", method={"id": "quantized-distillation", "bits": 9})


def test_a_folded_student_is_quantised_again(tiny, tmp_path):
    """Stages: first four bits, then two of what the four left."""
    stages = [
        {"name": "four", "method": {"id": "quantized-distillation", "bits": 4, "bucket": 32}},
        {"name": "two", "method": {"id": "quantized-distillation", "bits": 2, "bucket": 32}},
    ]
    result = run(tiny, tmp_path, stages=stages, method={"id": "quantized-distillation"}, baseline=True)
    network = zoo.load_model(tmp_path / "student")
    assert {layer.coded.scheme.levels for _, layer in q.coded_layers(network)} == {4}
    assert result.summary["cost"]["student"]["bytes"] < result.summary["cost"]["four"]["bytes"]


def test_adapters_and_foreign_formats_are_refused():
    from limbeck.saved import _check_form

    model, _ = network("llama")
    q.quantise(model, SCHEMES["bucket"])
    with pytest.raises(UserError, match="weights of this LlamaForCausalLM are quantised"):
        _check_form(q.fold(model), "hf")
    pytest.importorskip("peft")
    from limbeck.method import make

    adapted = zoo.adapt(network("llama")[0], rank=2)
    with pytest.raises(UserError, match="merge the adapter"):
        make("quantised").reshape(adapted, None)


def test_bits_that_are_computed_with():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 16, 5)).train()
    x = torch.randn(4, 2, 4, 4)
    macs = (3 * 16 * 18, 48 * 5)
    assert q.compute_bits(model, x) == sum(macs) * 32 * 32
    q.quantise(model, q.Scheme(levels=16), layers=["0"])
    assert q.compute_bits(model, x) == macs[0] * 4 * 32 + macs[1] * 32 * 32
    q.fold(model)
    assert q.compute_bits(model, x) == macs[0] * 4 * 32 + macs[1] * 32 * 32 and model.training and not model[0]._forward_hooks
    both = nn.Sequential(nn.Linear(6, 4))
    q.quantise(both, q.Scheme(levels=7, symmetric=True, activations=8))
    assert q.compute_bits(both, torch.randn(3, 6)) == 24 * 3 * 8
