"""Networks that denoise: shapes, labels, derivatives forwards and backwards, taps, saving, the start at zero, mistakes."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from limbeck.errors import UserError
from limbeck.zoo import NETWORKS, build, load_model, parameters, save_model
from limbeck.zoo.denoising import Condition, DenoisingNetwork
from limbeck.zoo.dit import grid_positions

torch.set_num_threads(1)
SMALL = {
    "denoising-mlp": {"width": 24, "depth": 3},
    "unet": {"width": 8, "groups": 4},
    "dit": {"dim": 16, "depth": 3, "heads": 2},
}
DIGITS = {"input_shape": (1, 8, 8), "classes": 10}
EVERY = pytest.mark.parametrize("name", sorted(SMALL))


def fails(match, call, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert caught.value.hint and "\n" not in caught.value.message


def stirred(name, shape=(1, 8, 8), classes=10, seed=0, **sizes):
    """A small network whose every parameter has been moved, so that nothing is zero any more."""
    torch.manual_seed(seed)
    net = build(name, input_shape=shape, classes=classes, **{**SMALL[name], **sizes})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def batch(shape=(1, 8, 8), size=3, classes=10, dtype=torch.float32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(size, *shape, generator=draw, dtype=torch.float64).to(dtype)
    level = (torch.rand(size, generator=draw, dtype=torch.float64) * 4 - 2).to(dtype)
    return x, level, torch.randint(0, classes + 1, (size,), generator=draw)


def test_denoisers_are_told_apart():
    assert {n for n, maker in NETWORKS.items() if getattr(maker, "denoises", False)} == {*SMALL, "guided"}
    for name in SMALL:
        net = build(name, **DIGITS, **SMALL[name])
        assert isinstance(net, DenoisingNetwork) and net.denoises and net.training
        assert (net.classes, net.null_label, net.input_shape) == (10, 10, (1, 8, 8))
    assert parameters(build("denoising-mlp", **DIGITS)) == 367360
    assert parameters(build("unet", **DIGITS, width=16)) == 141697
    assert parameters(build("dit", **DIGITS, dim=64, depth=3)) == 240004


@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, s) for n in sorted(SMALL) for s in [(1, 8, 8), (3, 8, 8), (1, 16, 16), (3, 16, 16), (1, 28, 28), (3, 64, 64), (2, 8, 16)]]
    + [("denoising-mlp", (5,)), ("denoising-mlp", (2, 3, 4, 5))],
)
def test_the_output_is_shaped_like_the_input(name, shape):
    sizes = {"attention": (False, False)} if name == "unet" and shape[-1] == 64 else {}
    sizes |= {"patch": 8} if name == "dit" and shape[-1] == 64 else {}
    net = stirred(name, shape, **sizes)
    x, level, label = batch(shape)
    out = net(x, level, label)
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all() and out.std() > 1e-3
    out.square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent, "every parameter has a say"
    rows = [p.grad.any(1) for n, p in net.named_parameters() if n.endswith("modulate.weight")]
    assert rows and all(row.all() for row in rows), "every scale, shift and gate has a say"


@pytest.mark.parametrize("sizes", [{"multipliers": (1,), "attention": (True,)}, {"multipliers": (1, 2, 2, 3), "attention": (False,) * 4}])
def test_unet_of_other_depths(sizes):
    net = stirred("unet", (3, 8, 8), blocks=2, **sizes)
    levels = len(sizes["multipliers"])
    assert len(net.taps) == 2 * levels + 1 and net(*batch((3, 8, 8))).shape == (3, 3, 8, 8)
    deepest = []
    net.get_submodule(net.middle).register_forward_hook(lambda _, __, out: deepest.append(out.shape))
    net(*batch((3, 8, 8)))
    assert deepest == [(3, 8 * sizes["multipliers"][-1], 8 >> (levels - 1), 8 >> (levels - 1))]


@EVERY
def test_labels(name):
    net = stirred(name)
    x, level, _ = batch()
    null = torch.full((3,), net.null_label)
    assert torch.equal(net(x, level), net(x, level, null)), "None is the null label"
    outs = [net(x, level, torch.full((3,), k)) for k in range(11)]
    assert all((outs[i] - outs[j]).abs().max() > 1e-4 for i in range(11) for j in range(i))
    mixed = net(x, level, torch.tensor([4, 10, 0]))
    for row, k in enumerate([4, 10, 0]):
        assert torch.allclose(mixed[row], outs[k][row], atol=1e-5), "each sample has its own label"
    assert (net(x, level) - net(x, level + 0.5)).abs().max() > 1e-4, "the level is read"
    with pytest.raises(IndexError):
        net(x, level, torch.full((3,), 11))
    free = stirred(name, classes=0)
    assert free.null_label == 0 and free.condition.label.num_embeddings == 1
    assert torch.equal(free(x, level), free(x, level, torch.tensor([3, 1, 2]))), "without classes a label is ignored"


@EVERY
def test_samples_do_not_see_each_other(name):
    net = stirred(name).double()
    x, level, label = batch(dtype=torch.float64)
    whole = net(x, level, label)
    for i in range(3):
        assert torch.allclose(net(x[i : i + 1], level[i : i + 1], label[i : i + 1]), whole[i : i + 1], atol=1e-12)
    assert torch.allclose(net(x, torch.tensor(0.7)), net(x, torch.full((3,), 0.7, dtype=torch.float64))), "one level for all"


@EVERY
def test_forward_mode_derivative(name):
    net = stirred(name).double()
    weights = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    x, level, label = batch(dtype=torch.float64)
    dx, dlevel, _ = batch(dtype=torch.float64, seed=2)

    def call(x, level):
        return functional_call(net, weights, (x, level, label))

    for vx, vl in [(dx, dlevel), (dx, torch.zeros_like(dlevel)), (torch.zeros_like(dx), dlevel)]:
        out, slope = jvp(call, (x, level), (vx, vl))
        h = 1e-5
        central = (call(x + h * vx, level + h * vl) - call(x - h * vx, level - h * vl)) / (2 * h)
        assert torch.allclose(out, net(x, level, label), atol=1e-12) and slope.abs().max() > 1e-3
        assert (slope - central).abs().max() < 1e-7 * max(1.0, central.abs().max().item())
    # As a loss of a consistency model has it: the slope is a number in a loss that is then differentiated by the weights.
    jvp(call, (x, level), (dx, dlevel))[1].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in net.named_parameters() if n != "out.bias")


@EVERY
def test_slopes_of_slopes(name):
    """A penalty on the slope by the sample, as critics and score matching have it, reaches the weights; against differences."""
    net = stirred(name).double()
    x, level, label = batch(dtype=torch.float64)

    def penalty():
        at = x.clone().requires_grad_()
        return torch.autograd.grad(net(at, level, label).square().sum(), at, create_graph=True)[0].square().sum()

    penalty().backward()
    weight = net.condition.time[2].weight
    entry = int(weight.grad.abs().argmax())
    place, h, values = (entry // weight.shape[1], entry % weight.shape[1]), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * h
        values.append(penalty().item())
        with torch.no_grad():
            weight[place] -= sign * h
    assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@EVERY
def test_functional_call_uses_the_weights_it_is_given(name):
    net, other = stirred(name), stirred(name, seed=5)
    inputs = batch()
    assert torch.equal(functional_call(net, dict(other.named_parameters()), inputs), other(*inputs))
    assert not torch.equal(net(*inputs), other(*inputs))


@EVERY
def test_the_same_bits_every_time_and_in_either_mode(name):
    net, inputs = stirred(name), batch()
    first = net(*inputs)
    assert torch.equal(net(*inputs), first) and torch.equal(net.eval()(*inputs), first)
    assert torch.equal(stirred(name)(*inputs), first), "the same seed makes the same network"
    assert not [m for m in net.modules() if isinstance(m, nn.Dropout | nn.modules.batchnorm._BatchNorm)]


@EVERY
def test_save_and_load_give_the_same_bits(name, tmp_path):
    net, inputs = stirred(name, fastest=3.0), batch()
    again = load_model(save_model(net, tmp_path / "m"))
    assert type(again) is type(net) and again.limbeck_config == net.limbeck_config == {
        "ref": f"zoo:{name}",
        "args": net.limbeck_config["args"],
    }
    assert torch.equal(again(*inputs), net(*inputs)) and again.taps == net.taps
    assert torch.equal(build(str(tmp_path / "m"))(*inputs), net(*inputs))


@EVERY
def test_taps_give_features_in_order_of_depth(name):
    net, seen = stirred(name), []
    modules = dict(net.named_modules())
    assert len(set(net.taps)) == len(net.taps) >= 3 and net.middle in net.taps
    for path in net.taps:
        modules[path].register_forward_hook(lambda _, __, out, path=path: seen.append((path, out)))
    net(*batch())
    assert tuple(path for path, _ in seen) == net.taps, "each is called once, in this order"
    shapes = {path: tuple(out.shape) for path, out in seen}
    if name == "denoising-mlp":
        assert set(shapes.values()) == {(3, 24)} and net.middle == "blocks.1"
    elif name == "dit":
        assert set(shapes.values()) == {(3, 16, 16)} and net.middle == "blocks.1"
    else:
        assert net.middle == "bottleneck" and net.taps == ("down.0", "down.1", "bottleneck", "up.0", "up.1")
        assert [shapes[p] for p in net.taps] == [(3, 8, 8, 8), (3, 16, 4, 4), (3, 16, 4, 4), (3, 16, 4, 4), (3, 8, 8, 8)]


def test_attention_sits_where_adapters_look_for_it():
    net, inputs = stirred("dit"), batch()
    plain = net(*inputs)
    handle = net.get_submodule("blocks.1.attention").register_forward_hook(lambda _, __, out: out + 1)
    assert not torch.allclose(net(*inputs), plain, atol=1e-4)
    handle.remove()
    with torch.no_grad():
        for part in (net.blocks[1].modulate.weight, net.blocks[1].modulate.bias):
            part[32:48] = 0  # The gate of the attention.
    plain = net(*inputs)
    net.get_submodule("blocks.1.attention").register_forward_hook(lambda _, __, out: out + 1)
    assert torch.equal(net(*inputs), plain), "the hook is before the gate"


def test_unet_leads_every_stage_down_across_to_its_stage_up():
    net, outs, ins = stirred("unet"), {}, {}
    for i in range(2):
        net.down[i].register_forward_hook(lambda _, __, out, i=i: outs.update({i: out}))
        net.up[i].register_forward_pre_hook(lambda _, given, i=i: ins.update({i: given[0]}))
    net(*batch())
    assert torch.equal(ins[0][:, 16:], outs[1]) and torch.equal(ins[1][:, 8:], outs[0])


def test_unet_has_attention_only_where_asked():
    def where(**sizes):
        return [n for n, _ in build("unet", **DIGITS, width=8, **sizes).named_modules() if n.endswith(".attention")]

    assert where(attention=(False, False)) == []
    low = [f"{s}.attentions.0.attention" for s in ("down.1", "bottleneck", "up.0")]
    assert where() == low and where(attention=(True, False)) == ["down.0.attentions.0.attention", "up.1.attentions.0.attention"]


@EVERY
@pytest.mark.parametrize("classes", [0, 10])
def test_the_output_is_zero_before_training(name, classes):
    net = build(name, input_shape=(1, 8, 8), classes=classes, **SMALL[name])
    x, level, label = batch()
    out = net(x, level, label if classes else None)
    assert not out.any()
    (out - x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in net.parameters()), "yet it can learn"


def test_unet_and_transformer_tell_places_apart():
    x = torch.zeros(1, 1, 8, 8)
    tokens = stirred("dit")(x, torch.zeros(1))
    assert (tokens[..., :2, :2] - tokens[..., 2:4, 4:6]).abs().max() > 1e-4
    table = grid_positions(3, 5, 12)
    assert table.shape == (15, 12) and len({tuple(row.tolist()) for row in table}) == 15
    assert torch.equal(table[5 * 1 + 2, :6], table[5 * 1 + 4, :6]) and torch.equal(table[5 * 0 + 2, 6:], table[5 * 2 + 2, 6:])
    net = stirred("dit", (1, 8, 12))
    with torch.no_grad():  # A token's square goes back to its own place: the last layer alone sees the token of patch (1, 4).
        probe = torch.zeros(1, 24, 16)
        probe[0, 6 * 1 + 4] = torch.randn(16)
        net.norm.register_forward_hook(lambda *_: probe)
        net.modulate.weight.zero_()
        net.modulate.bias.zero_()
        net.out.bias.zero_()
        out = net(torch.zeros(1, 1, 8, 12), torch.zeros(1))[0, 0]
    assert out[2:4, 8:10].abs().min() > 0 and out.count_nonzero() == 4
    assert torch.allclose(out[2:4, 8:10].flatten(), net.out.weight @ probe[0, 10])


def test_slow_frequencies_keep_the_slope_small():
    told = Condition(0, 8, 0.2, 4.0, "x")
    assert torch.allclose(told.frequencies[[0, -1]], torch.tensor([0.2, 4.0])) and "frequencies" not in told.state_dict()
    ratio = told.frequencies[1:] / told.frequencies[:-1]
    assert torch.allclose(ratio, ratio[0].expand(15))
    assert torch.allclose(build("dit", **DIGITS, slowest=1, fastest=9.0).condition.frequencies[[0, -1]], torch.tensor([1.0, 9.0]))


def test_mistakes():
    shape = {"classes": 3}
    fails(
        "cannot be halved 2 times for 3 levels",
        build,
        "unet",
        **DIGITS | {"input_shape": (1, 6, 8)},
        multipliers=(1, 1, 1),
        attention=(False,) * 3,
    )
    fails("28 x 30 cannot be halved 2", build, "unet", input_shape=(1, 28, 30), **shape, multipliers=(1, 2, 4), attention=(False,) * 3)
    fails("attention for 2 levels, but multipliers for 3", build, "unet", **DIGITS, multipliers=(1, 2, 4))
    fails("8 groups do not divide width 12", build, "unet", **DIGITS, width=12)
    fails("3 heads do not divide 64", build, "unet", **DIGITS, heads=3)
    fails("multipliers is 0", build, "unet", **DIGITS, multipliers=(), attention=())
    fails("multipliers is 0", build, "unet", **DIGITS, multipliers=(1, 0))
    fails("do not tile 8 x 8", build, "dit", **DIGITS, patch=3)
    fails("patch is 0", build, "dit", **DIGITS, patch=0)
    fails("5 heads do not divide dim 96", build, "dit", **DIGITS, heads=5)
    fails("no multiple of 4", build, "dit", **DIGITS, dim=18, heads=2)
    fails("takes no argument 'widht'.*'width'", build, "unet", **DIGITS, widht=4)
    fails("needs classes", build, "dit", input_shape=(1, 8, 8))
    fails("shape \\(\\)", build, "denoising-mlp", input_shape=(), classes=2)
    fails("depth is 0", build, "denoising-mlp", **DIGITS, depth=0)
    for name in SMALL:
        fails("for -1 classes", build, name, input_shape=(1, 8, 8), classes=-1)
        fails("frequencies from 4 to 1", build, name, **DIGITS, slowest=4, fastest=1)
        fails("frequencies from 0 to", build, name, **DIGITS, slowest=0)
        if name != "denoising-mlp":
            fails("needs pictures", build, name, input_shape=(64,), classes=3)


@EVERY
def test_training_lowers_the_loss(name):
    """A toy on one axis: the target depends on the sample, the level and the label, and each must be used to get there."""
    torch.manual_seed(0)
    shape = (1,) if name == "denoising-mlp" else (1, 4, 4)
    net = build(name, input_shape=shape, classes=2, **{**SMALL[name], "depth": 1} if name != "unet" else SMALL[name])
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(128, generator=draw)
    level = torch.rand(128, generator=draw) * 4 - 2
    label = torch.randint(0, 3, (128,), generator=draw)
    goal = torch.tanh(value) + torch.sin(2 * level) + label - 1
    x, want = (t.view(-1, *[1] * len(shape)).expand(-1, *shape) for t in (value, goal))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(120):
        loss = (net(x, level, label) - want).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[0] == pytest.approx(float(goal.square().mean()), rel=1e-4), "it starts from saying 0"
    assert sum(losses[-5:]) / 5 < 0.05 * losses[0], "0.2 or more would remain if one of the three were not read"
