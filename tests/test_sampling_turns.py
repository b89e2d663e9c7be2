"""Sampling methods: whose gradient goes where, passes a step, the forms that closed-form tests leave out, other processes than flow."""

import copy

import pytest
import torch
from torch import nn

from limbeck import models, schema
from limbeck.data import open_data
from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, Flow, expand, make_process
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.losses import pseudo_huber
from limbeck.sampling.few_step import Pair
from limbeck.sampling.methods.agd import AGD
from limbeck.sampling.methods.boot import BOOT
from limbeck.sampling.methods.consistency import Consistency
from limbeck.sampling.methods.diffusion_training import DiffusionTraining
from limbeck.sampling.methods.freeflow import FreeFlow
from limbeck.sampling.methods.hyper_sd import HyperSD
from limbeck.sampling.methods.rf_plus_plus import RFPlusPlus
from limbeck.sampling.methods.sana_sprint import SanaSprint
from limbeck.sampling.pictures import Pictures
from limbeck.zoo import build

CLOCK = Clock(3, 10, 10)


def network(kind="denoising-mlp"):
    sizes = {"denoising-mlp": {"width": 16, "depth": 2}, "dit": {"dim": 16, "depth": 2, "heads": 2}, "unet": {"width": 8, "groups": 4}}
    torch.manual_seed(3)
    made = build(kind, input_shape=(1, 8, 8), classes=10, **sizes[kind])
    for p in made.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return made


def pair_of(process="flow", prediction="velocity", guidance=1.0, kind="denoising-mlp", batch=8, code="position"):
    """A pair of copies of one small network on digits."""
    data = open_data("digits", train=200)
    net = network(kind)
    teacher = Denoiser(net.eval().requires_grad_(False), make_process(process), prediction, classes=10, code=code).guided(guidance)
    student = teacher.with_network(copy.deepcopy(net).train().requires_grad_(True))
    training = schema.Training(steps=10, batch=batch, optimizer="adam", lr=1e-3)
    return Pair(teacher, student, Pictures(data), schema.Generate(), training, 10, torch.device("cpu"), 0, Session())


def opened(method, pair):
    method.bind(pair)
    torch.manual_seed(0)
    method.setup(pair)
    return method


def batch_of(pair, count=8):
    torch.manual_seed(5)
    return Batch(*pair.pictures.random(count))


def reached(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


@pytest.mark.parametrize("method", [HyperSD(grid_steps=8, segments=(2, 1)), SanaSprint(warmup=1)], ids=lambda m: m.card.id)
def test_adversarial_turns_keep_apart(method):
    """The student's turn reaches the student and never the heads; the critic's turn the heads alone; the teacher neither."""
    pair = pair_of()
    opened(method, pair)
    batch = batch_of(pair)
    sum(method.losses("student", batch, CLOCK).values()).backward()
    assert reached(pair.student.network) and not reached(method.parts["heads"])
    pair.student.network.zero_grad()
    sum(method.losses("critic", batch, CLOCK).values()).backward()
    assert reached(method.parts["heads"]) and not reached(pair.student.network)
    assert not reached(pair.teacher.network)


def test_the_adversarial_gradient_passes_through_the_teacher():
    """With the consistency part silenced the student still learns: through the frozen teacher's features."""
    pair = pair_of()
    method = opened(HyperSD(grid_steps=8, segments=(1,), adversarial=1.0), pair)
    method.losses("student", batch_of(pair), CLOCK)["adversarial"].backward()
    assert reached(pair.student.network) and not reached(pair.teacher.network)


def test_teacher_passes_of_hyper_sd():
    """One solver pass and one of features in the student's turn; the critic's turn adds only the target's features."""
    pair = pair_of()
    method = opened(HyperSD(grid_steps=8, segments=(2,)), pair)
    calls = []
    pair.teacher.network.register_forward_hook(lambda *a: calls.append(1))
    method.losses("student", batch_of(pair), CLOCK)
    assert len(calls) == 2
    method.losses("critic", batch_of(pair), CLOCK)
    assert len(calls) == 3


def test_reward_of_hyper_sd_comes_late_and_lifts():
    """Before three quarters no reward term; after them its gradient makes pictures brighter."""
    pair = pair_of()
    method = opened(HyperSD(grid_steps=8, segments=(1,), adversarial=0.0, reward="ink", reward_weight=1.0, margin=5.0), pair)
    assert "reward" not in method.losses("student", batch_of(pair), Clock(5, 10, 10))
    term = method.losses("student", batch_of(pair), Clock(9, 10, 10))["reward"]
    assert float(term) > 0
    optimizer = torch.optim.SGD(pair.student.network.parameters(), 0.3)
    torch.manual_seed(1)
    before = float(method._late(64).mean())
    for _ in range(20):
        optimizer.zero_grad()
        method.losses("student", batch_of(pair), Clock(9, 10, 10))["reward"].backward()
        optimizer.step()
    torch.manual_seed(1)
    assert float(method._late(64).mean()) > before + 0.05


def test_the_weight_of_the_huber_loss_is_one_minus_t(monkeypatch):
    pair = pair_of()
    method = opened(RFPlusPlus(pairs=16, teacher_steps=2), pair)
    t = torch.linspace(0.1, 0.9, 8)
    monkeypatch.setattr(Flow, "draw", lambda self, count, *more: t[:count].clone())
    torch.manual_seed(1)
    noise, x0, labels = method._pairs.draw(8)
    torch.manual_seed(1)
    got = method.losses("student", None, CLOCK)["velocity"]
    near = t * (1 - 2e-5) + 1e-5
    x = (1 - expand(near, x0)) * x0 + expand(near, x0) * noise
    error = pair.student.network(x, near, labels) - (noise - x0)
    assert torch.allclose(got, ((1 - near) * pseudo_huber(error)).mean(), rtol=1e-4)
    assert not torch.allclose(got, (near * pseudo_huber(error)).mean(), rtol=1e-2)


def test_the_perceptual_distance():
    """Zero for equal pictures, positive for others, and its gradient reaches the picture and not the teacher."""
    pair = pair_of()
    method = opened(RFPlusPlus(pairs=16, teacher_steps=2, perceptual=1.0), pair)
    x = torch.rand(8, 1, 8, 8, requires_grad=True)
    labels = torch.arange(8)
    assert float(method._distance(x, x.detach(), labels).max()) == 0
    distance = method._distance(x, torch.rand(8, 1, 8, 8), labels).sum()
    distance.backward()
    assert float(distance) > 0 and bool(x.grad.any()) and not reached(pair.teacher.network)
    assert "perceptual" in method.losses("student", None, CLOCK)


@pytest.mark.parametrize("form", ["additive", "attention"])
@pytest.mark.parametrize("kind", ["denoising-mlp", "dit", "unet"])
def test_guided_networks_begin_as_their_base(form, kind):
    """Both forms of adapters add nothing at first, on every embedded network, and learn without touching the base."""
    pair = pair_of(guidance=3.0, kind=kind)
    base = copy.deepcopy(pair.student.network)
    method = opened(AGD(paths=8, path_steps=2, hidden=8, form=form), pair)
    x, t, labels, _, _ = method._kept
    assert torch.allclose(pair.student.raw(x, t, labels), base(x, t, labels), atol=1e-6)
    method.losses("student", None, CLOCK)["guidance"].backward()
    learnt = reached(pair.student.network)
    assert learnt and not any(name.startswith("inner.") for name in learnt)


def test_agd_on_noised_pictures_and_whole():
    pair = pair_of(guidance=3.0)
    method = opened(AGD(states="noised", whole=True, hidden=8), pair)
    assert method.needs_pictures()
    method.losses("student", batch_of(pair), CLOCK)["guidance"].backward()
    assert any(name.startswith("inner.") for name in reached(pair.student.network))


def test_agd_keeps_the_interval_of_the_guidance():
    """Outside the interval the stored target is the unguided prediction."""
    pair = pair_of()
    pair.teacher = pair.teacher.guided(3.0, 0.0, 0.5)
    method = opened(AGD(paths=6, path_steps=4, hidden=8), pair)
    x, t, labels, _, aim = method._kept
    plain = pair.teacher.guided(1.0)
    given = plain.raw(x, t, labels)
    same = (aim - given).abs().flatten(1).max(1).values < 1e-6
    assert torch.equal(same, t / (1 - t).clamp_min(1e-9) > 0.5)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "x0", "v", "edm"])
def test_diffusion_training_has_the_target_of_its_prediction(prediction):
    """With a network that gives zero the loss is the mean square of what should be predicted."""
    pair = pair_of("cosine", prediction)

    class Zero(nn.Module):
        def forward(self, x, level, label=None):
            seen.append(label)
            return torch.zeros_like(x)

    seen = []
    pair.student = Denoiser(Zero(), pair.student.own, prediction, classes=10)
    pair.spec = schema.Generate(label_dropout=0.5)
    method = opened(DiffusionTraining(), pair)
    batch = batch_of(pair, 400)
    torch.manual_seed(2)
    got = method.losses("student", batch, CLOCK)["denoising"]
    torch.manual_seed(2)
    process = pair.student.own
    t = process.draw(400)
    torch.rand(400)
    noise = torch.randn_like(batch.inputs)
    aim = process.read(prediction, batch.inputs, noise, t)
    assert torch.allclose(got, aim.square().mean(), rtol=1e-4)
    hidden = float((seen[0] == 10).float().mean())
    assert 0.4 < hidden < 0.6


@pytest.mark.parametrize(
    ("process", "prediction", "code"),
    [
        ("ddpm", "noise", "position"),
        ("edm", "edm", "log"),
        ("cosine", "v", "position"),
        ({"name": "flow", "shift": 3.0}, "velocity", "position"),
    ],
)
@pytest.mark.parametrize(
    "method",
    [Consistency(intervals=6), FreeFlow(), SanaSprint(warmup=1), HyperSD(grid_steps=8), RFPlusPlus(pairs=16, teacher_steps=2), BOOT()],
    ids=lambda m: m.card.id,
)
def test_other_processes(method, process, prediction, code):
    """Under every process the terms are finite, and the student gets a finite gradient."""
    pair = pair_of(process, prediction, code=code)
    opened(copy.deepcopy(method), pair)
    method = opened(copy.deepcopy(method), pair)
    for turn in method.turns(CLOCK):
        terms = method.losses(turn, batch_of(pair), CLOCK)
        assert all(bool(torch.isfinite(value)) for value in terms.values()), terms
        if turn == "student":
            sum(terms.values()).backward()
    grads = [p.grad for p in pair.student.network.parameters() if p.grad is not None]
    assert grads and all(bool(torch.isfinite(g).all()) for g in grads)


def test_a_network_that_was_found_gives_the_bits_of_one_that_was_trained(tmp_path, monkeypatch):
    """Random numbers after `kept` are the same whether the network was trained now or lay in the cache."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)

        def train(work, key):
            torch.rand(10)
            return network()

        models.kept({"what": "test"}, network(), Session(), "thing", train)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_pair_draws_depend_on_nothing_else():
    pair = pair_of()
    torch.manual_seed(1)
    first = pair.noise(3), pair.labels(3)
    torch.manual_seed(1)
    again = pair.noise(3), pair.labels(3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_the_target_of_consistency_is_a_moving_average():
    pair = pair_of()
    method = opened(Consistency(intervals=6, target=0.9), pair)
    before = [p.clone() for p in method.parts["target"].parameters()]
    for p in pair.student.network.parameters():
        p.data += 1.0
    method.after_step(CLOCK)
    for old, new, own in zip(before, method.parts["target"].parameters(), pair.student.network.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * own, atol=1e-6)


def test_freeflow_weighs_large_gaps_less():
    """The term is |w D|^2 with w = (|D|^2 / numel + eps)^-k: with k = 1 large gaps count little, with k = 0 the term is |D|^2."""
    values = {}
    for power in (0.0, 1.0):
        pair = pair_of()
        method = opened(FreeFlow(share=1.0, power=power, eps=1e-3), pair)
        torch.manual_seed(6)
        values[power] = float(method.losses("student", None, CLOCK)["prediction"])
    pair = pair_of()
    method = opened(FreeFlow(share=1.0), pair)
    torch.manual_seed(6)
    noise, labels = pair.noise(8), pair.labels(8)
    way = torch.rand(8)
    made = method.average(noise, way, labels)
    reached = noise + expand(way, noise) * made
    gap = made + expand(way, noise) * method.slope(noise, way, labels) + pair.teacher.velocity(reached, 1 - way, labels)
    size = gap.square().flatten(1).mean(1)
    assert values[0.0] == pytest.approx(float(size.mean()), rel=1e-4)
    assert values[1.0] == pytest.approx(float((size / (size + 1e-3) ** 2).mean()), rel=1e-4)


def test_sana_weighs_by_the_cotangent_and_the_learned_variance(monkeypatch):
    """mean e^-l |F - F- - g|^2 / tan t + l: the value of the error is |g|^2, since F and F- are equal."""
    pair = pair_of()
    method = opened(SanaSprint(warmup=1, adversarial=0.0), pair)
    t = torch.tensor([0.3, 0.5, 0.8, 1.1, 1.3, 0.4, 0.9, 1.2])
    monkeypatch.setattr(method, "_times", lambda count, mean, spread: t)
    nn.init.constant_(method.parts["variance"].out.bias, 0.7)
    batch = batch_of(pair)
    torch.manual_seed(8)
    got = float(method.losses("student", batch, CLOCK)["consistency"])
    torch.manual_seed(8)
    noise = torch.randn_like(batch.inputs)
    cos, sin = expand(t.cos(), noise), expand(t.sin(), noise)
    x = cos * batch.inputs + sin * noise
    own, path = method.output(x, t, batch.labels), method.output(x, t, batch.labels, method._teacher)
    g = -(cos**2) * (own - path) - (cos * sin * x + method.tangent(x, t, path, batch.labels))
    g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
    want = (torch.exp(torch.tensor(-0.7)) * g.square().flatten(1).mean(1) / t.tan() + 0.7).mean()
    assert got == pytest.approx(float(want), rel=1e-4)
