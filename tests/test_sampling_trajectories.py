"""The mathematics of the methods that follow paths, against the closed forms of a Gaussian."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, Flow, Mixture, exact_denoiser, expand, make_process
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.sampling.few_step import Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.methods.agd import AGD
from limbeck.sampling.methods.boot import BOOT
from limbeck.sampling.methods.consistency import Consistency, consistency_function
from limbeck.sampling.methods.fewer_steps import FewerSteps
from limbeck.sampling.methods.freeflow import FreeFlow
from limbeck.sampling.methods.hyper_sd import HyperSD
from limbeck.sampling.methods.noise_regression import NoiseRegression
from limbeck.sampling.methods.rf_plus_plus import RFPlusPlus
from limbeck.sampling.methods.sana_sprint import SanaSprint
from limbeck.sampling.trajectories import TeacherPairs, solver_step
from limbeck.zoo import build

SHAPE = (1, 2, 2)
MEAN, STD = 0.3, 0.5
LATE = SimpleNamespace(step=10**6, progress=0.99)


@pytest.fixture(autouse=True)
def exact_numbers():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def radius(process, t, std=STD):
    return (process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2).sqrt()


def moved(process, x, t, s, std=STD):
    """The probability-flow path of N(MEAN, std^2 I) from t to s."""
    a, b = expand(process.alpha(t), x), expand(process.alpha(s), x)
    return b * MEAN + expand(radius(process, s, std) / radius(process, t, std), x) * (x - a * MEAN)


class Known(nn.Module):
    """A network that gives `rule(x, t)`, moved by a number that can learn."""

    def __init__(self, rule, off=0.0):
        super().__init__()
        self.rule, self.off = rule, nn.Parameter(torch.tensor(float(off)))

    def forward(self, x, level, label=None):
        return self.rule(x, level) + self.off


def consistent(process, kind, off=0.0, std=STD):
    def rule(x, t):
        x0 = MEAN + expand(std / radius(process, t, std), x) * (x - expand(process.alpha(t), x) * MEAN)
        noise = (x - expand(process.alpha(t), x) * x0) / expand(process.sigma(t), x).clamp_min(1e-12)
        return process.read(kind, x0, noise, t)

    return Denoiser(Known(rule, off), process, kind, code="time")


def teacher_of(process, kind="velocity", std=STD):
    return exact_denoiser(Mixture(torch.full((1, *SHAPE), MEAN), std), process, kind)


def pair_of(teacher, student, batch=64):
    spec = SimpleNamespace(steps=[1], grid="uniform", sampler=None, label_dropout=0.0)
    pictures = SimpleNamespace(shape=SHAPE, classes=0)
    return Pair(teacher, student, pictures, spec, SimpleNamespace(batch=batch), 100, torch.device("cpu"), 0, Session())


def opened(method, teacher, student, batch=64):
    pair = pair_of(teacher, student, batch)
    method.bind(pair)
    method.setup(pair)
    return method


def pictures(count=64, std=STD):
    return Batch(MEAN + std * torch.randn(count, *SHAPE), None, None)


def loss(method, batch=None, seed=1, clock=LATE):
    torch.manual_seed(seed)
    return sum(method.losses("student", batch, clock).values())


def pull(method, batch=None):
    """The gradient of the loss by the number that moves the student."""
    network = method.pair.student.network
    network.off.grad = None
    loss(method, batch).backward()
    return float(network.off.grad)


FLOW = Flow()
PROCESSES = {"flow": FLOW, "cosine": make_process({"name": "cosine"}), "edm": make_process({"name": "edm"})}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("order", [1, 2])
def test_the_solver_has_its_order(name, order):
    process = PROCESSES[name]
    angle = torch.full((16,), 0.9)
    x = torch.randn(16, *SHAPE)
    t = process.time_at(angle)
    errors = []
    for step in (0.1, 0.05):
        s = process.time_at(angle - step)
        errors.append(float((solver_step(teacher_of(process), x, t, s, None, order) - moved(process, x, t, s)).abs().max()))
    assert errors[0] > 1e-9
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.35)


@pytest.mark.parametrize("name,kind", [("flow", "velocity"), ("cosine", "v"), ("cosine", "velocity"), ("edm", "noise")])
def test_the_exact_consistency_function_has_no_loss(name, kind):
    process = PROCESSES[name]
    values = []
    for intervals in (16, 64):
        method = opened(Consistency(intervals=intervals, distance="mse"), teacher_of(process), consistent(process, kind))
        values.append(float(loss(method, pictures()).detach()))
    assert values[1] < values[0] / 16 and values[1] < 3e-3
    if name == "flow":
        for off in (0.2, -0.2):
            method = opened(Consistency(intervals=64, distance="mse", target=0.0), teacher_of(process), consistent(process, kind, off))
            method._target = consistent(process, kind)
            assert pull(method, pictures()) * off > 0


def test_the_boundary_of_a_network_that_gives_x0():
    x, t = torch.randn(3, *SHAPE), torch.zeros(3)
    student = Denoiser(Known(lambda x, t: x * 0 + 5), FLOW, "x0", code="time")
    assert torch.allclose(consistency_function(student, x, t, None), x)
    half = torch.full((3,), 0.5)  # sigma/alpha = 1: skip 0.25/1.25
    assert torch.allclose(consistency_function(student, x, half, None), 0.2 * x / 0.5 + 0.8 * 5)


def test_hyper_sd_stages_jumps_and_grid():
    teacher, student = teacher_of(FLOW, std=1e-6), consistent(FLOW, "velocity", std=1e-6)
    method = opened(HyperSD(grid_steps=16, adversarial=0.0, target=0.5), teacher, student)
    assert [method.stage(SimpleNamespace(progress=p)) for p in (0.0, 0.24, 0.25, 0.5, 0.75, 1.0)] == [8, 8, 4, 2, 1, 1]
    x, t = torch.randn(8, *SHAPE), torch.rand(8) * 0.9 + 0.05
    assert torch.allclose(method.jump(student, x, t, t, None), x)
    assert float(loss(method, pictures(std=1e-6))) < 1e-9
    for off in (0.2, -0.2):
        wrong = opened(HyperSD(grid_steps=16, adversarial=0.0), teacher, consistent(FLOW, "velocity", off, std=1e-6))
        wrong._target = student
        assert pull(wrong, pictures(std=1e-6)) * off > 0
    method.pair.student.network.off.data.fill_(1.0)
    method.after_step(LATE)
    assert float(method.parts["target"].off) == pytest.approx(0.5)
    with pytest.raises(UserError, match="segments"):
        opened(HyperSD(grid_steps=18, adversarial=0.0), teacher, student)


@pytest.mark.parametrize("progress,k", [(0.0, 8), (0.3, 4), (0.6, 2), (0.9, 1)])
def test_hyper_sd_stays_in_its_segment(progress, k):
    method = opened(HyperSD(grid_steps=16, adversarial=0.0), teacher_of(FLOW), consistent(FLOW, "velocity"))
    seen = []
    plain = method.jump
    method.jump = lambda d, x, t, end, labels: (seen.append((t, end)), plain(d, x, t, end, labels))[1]
    loss(method, pictures(512), clock=SimpleNamespace(step=0, progress=progress))
    (t, end), (r, same) = seen
    place, stop, near = ((16 * (1 - v)).round().long() for v in (t, end, r))
    long = 16 // k
    assert torch.equal(end, same) and torch.equal(near, place + 1)
    last = (place // long + 1) * long
    assert bool((stop == last)[near < last].any())
    assert bool((stop >= near).all()) and bool((stop <= (place // long + 1) * long).all())
    assert set(((place // long + 1) * long - stop).tolist()) == set(range(long)) and set(place.tolist()) == set(range(16))


@pytest.mark.parametrize("order,power", [(1, 4), (2, 6)])
def test_boot_knows_the_signal(order, power):
    def rule(z, t):
        t = t.clamp_max(1 - 1e-9)
        x = moved(FLOW, z, torch.ones_like(t), t)
        return z - (x - expand(t, z) * z) / expand(1 - t, z)

    values = []
    for delta in (0.04, 0.02):
        student = Denoiser(Known(rule), FLOW, code="time")
        method = opened(BOOT(delta=delta, order=order, beta=0.0, least=0.2), teacher_of(FLOW), student, 4096)
        values.append(float(loss(method)))
    assert math.log2(values[0] / values[1]) == pytest.approx(power, abs=0.7)
    for off in (0.3, -0.3):
        method = opened(BOOT(beta=1.0, least=0.2), teacher_of(FLOW), Denoiser(Known(rule, off), FLOW, code="time"))
        assert pull(method) * off > 0
    method = opened(BOOT(beta=1.0), teacher_of(FLOW), Denoiser(Known(rule), FLOW, code="time"), 512)
    torch.manual_seed(0)
    assert float(method.losses("student", None, LATE)["boundary"]) < 1e-3


def flow_map(z, t):
    d = expand(1 - t, z).clamp_min(1e-9)
    return -(MEAN + ((d**2 * STD**2 + (1 - d) ** 2).sqrt() - 1) / d * z)


def test_freeflow_knows_the_flow_map():
    method = opened(FreeFlow(share=1.0), teacher_of(FLOW), Denoiser(Known(flow_map), FLOW, code="time"))
    assert float(loss(method)) < 1e-12
    z, way = torch.randn(32, *SHAPE), torch.rand(32) * 0.8 + 0.1
    forward = method.slope(z, way, None)
    method.derivative = "difference"
    assert torch.allclose(forward, method.slope(z, way, None), atol=1e-3)
    for off in (0.3, -0.3):
        wrong = opened(FreeFlow(share=1.0), teacher_of(FLOW), Denoiser(Known(flow_map, off), FLOW, code="time"))
        assert pull(wrong) * off > 0


def test_freeflow_corrects_towards_the_teacher():
    for off in (0.3, -0.3):
        method = opened(FreeFlow(share=0.0), teacher_of(FLOW), Denoiser(Known(flow_map, off), FLOW, code="time"))
        method._fake = exact_denoiser(Mixture(torch.full((1, *SHAPE), MEAN - off), STD), FLOW)  # x0 = z - net
        assert pull(method) * off > 0


def test_freeflow_always_leaves_a_sample_for_correction():
    method = opened(FreeFlow(share=0.97), teacher_of(FLOW), Denoiser(Known(flow_map), FLOW, code="time"), 8)
    assert set(method.losses("student", None, LATE)) == {"prediction", "correction"}
    assert math.isfinite(float(method.losses("fake", None, LATE)["fake"]))


def test_the_tangent_of_the_exact_student_vanishes():
    method = opened(SanaSprint(adversarial=0.0, spread=0.7), teacher_of(FLOW), consistent(FLOW, "velocity"))
    assert float(loss(method, pictures())) < 1e-12
    x, t = torch.randn(32, *SHAPE), torch.rand(32) * 1.2 + 0.1
    path = method.output(x, t, None, method._teacher)
    forward = method.tangent(x, t, path, None)
    method.derivative = "difference"
    assert torch.allclose(forward, method.tangent(x, t, path, None), atol=1e-4)
    for off in (0.2, -0.2):
        wrong = opened(SanaSprint(adversarial=0.0, spread=0.7), teacher_of(FLOW), consistent(FLOW, "velocity", off))
        assert pull(wrong, pictures()) * off > 0


def test_pairs_are_the_teachers_and_the_same_twice():
    pair = pair_of(teacher_of(FLOW), consistent(FLOW, "velocity"))
    one, two = TeacherPairs(pair, 32, 32), TeacherPairs(pair, 32, 32)
    assert torch.equal(one.noise, two.noise) and torch.equal(one.aim, two.aim)
    ones = torch.ones(32)
    assert torch.allclose(one.aim, moved(FLOW, one.noise, ones, ones * 0), atol=5e-3)


@pytest.mark.parametrize("kind", ["velocity", "x0"])
def test_regression_on_pairs(kind):
    method = opened(NoiseRegression(pairs=64, teacher_steps=64), teacher_of(FLOW), consistent(FLOW, kind))
    assert float(loss(method)) < 1e-5
    method = opened(NoiseRegression(pairs=64), teacher_of(FLOW), consistent(FLOW, kind, 0.3))
    assert pull(method) > 0


def test_rectified_flow_losses():
    """A point as data has straight paths: no loss; a shifted velocity has its Huber distance, weighted by 1 - t under the U-shaped law."""
    teacher = teacher_of(FLOW, std=0.0)
    point = consistent(FLOW, "velocity", std=1e-9)
    method = opened(RFPlusPlus(pairs=64, teacher_steps=2), teacher, point)
    assert float(loss(method)) < 1e-6
    assert method._straightness(Generator(point, SHAPE)) < 1e-9
    for off in (0.3, -0.3):
        assert pull(opened(RFPlusPlus(pairs=64), teacher, consistent(FLOW, "velocity", off, 1e-9))) * off > 0
    told = []
    method.pair.student.network.rule = lambda x, t: (told.append(t), x)[1]
    method.pair.training.batch = 20000
    method.losses("student", None, LATE)
    u = told[0]
    # density (a / (2 (e^a - 1))) (e^{a t} + e^{a (1 - t)}): the share below 1/4 and its mirror
    share = ((math.exp(1) - 1) + (math.exp(4) - math.exp(3))) / (2 * (math.exp(4) - 1))
    assert float((u < 0.25).double().mean()) == pytest.approx(share, abs=0.015)
    assert float((u > 0.75).double().mean()) == pytest.approx(share, abs=0.015)


def test_the_teacher_itself_has_no_endpoint_error():
    teacher = teacher_of(FLOW)
    teacher.network.anchor = nn.Parameter(torch.zeros(()))
    method = FewerSteps()
    method.bind(pair_of(teacher, teacher))
    assert method.endpoint_error(Generator(teacher, SHAPE, sampler="heun"), 32) < 1e-6
    assert method.endpoint_error(Generator(teacher, SHAPE, sampler="ddim"), 1) > 0.01


def agd(states="paths", scale=3.0, **more):
    net = build("denoising-mlp", input_shape=SHAPE, classes=3, width=8, depth=2)
    for weights in net.parameters():  # its last layer is zero at first
        nn.init.normal_(weights, std=0.3)
    teacher = Denoiser(net, FLOW, classes=3).guided(scale)
    pair = pair_of(teacher, Denoiser(copy.deepcopy(net), FLOW, classes=3), 8)
    method = AGD(paths=5, path_steps=3, hidden=8, states=states, **more)
    method.bind(pair)
    method.setup(pair)
    return method


def test_agd_starts_unguided_and_learns_guidance():
    method = agd(w_max=4.0)
    teacher, student = method.pair.teacher, method.pair.student
    x, t, labels, scale, aim = method._kept
    assert torch.allclose(student.raw(x, t, labels), teacher.guided(1.0).raw(x, t, labels))
    null = torch.full_like(labels, 3)
    plain = teacher.guided(1.0)
    free, given = plain.raw(x, t, null), plain.raw(x, t, labels)
    assert torch.allclose(aim, free + expand(scale, x) * (given - free))
    # the next state of a path is the guided step of the one before
    assert torch.allclose(x[5:10], x[:5] + expand(t[5:10] - t[:5], x[:5]) * aim[:5], atol=1e-6)
    assert float(scale.min()) >= 1 and float(scale.max()) <= 4 and torch.equal(scale[:5], scale[5:10])
    assert not any(p.requires_grad for p in student.network.inner.parameters())
    for adapter in student.network.adapters:
        nn.init.normal_(adapter.layers[-1].weight)
    seen = []
    student.network.by_scale.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    loss(method)
    assert all(any(torch.equal(w, s) for s in scale) for w in seen[0]) and student.network.told is None
    student.network.told = torch.ones(len(x))
    one = student.raw(x, t, labels)
    student.network.told = None
    assert not torch.allclose(one, student.raw(x, t, labels))
    with pytest.raises(RuntimeError, match="broken"):
        student.network.by_level.forward = lambda value: (_ for _ in ()).throw(RuntimeError("broken"))
        loss(method)
    assert student.network.told is None


def test_agd_wants_guidance():
    with pytest.raises(UserError, match="none"):
        agd(scale=1.0)
    with pytest.raises(UserError, match="below"):
        agd(w_max=2.0)
