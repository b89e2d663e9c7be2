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
from limbeck.sampling.methods import hyper_sd
from limbeck.sampling.methods.agd import AGD
from limbeck.sampling.methods.boot import BOOT
from limbeck.sampling.methods.consistency import Consistency, consistency_function
from limbeck.sampling.methods.diffusion_training import DiffusionTraining
from limbeck.sampling.methods.fewer_steps import FewerSteps
from limbeck.sampling.methods.freeflow import FreeFlow
from limbeck.sampling.methods.hyper_sd import HyperSD
from limbeck.sampling.methods.noise_regression import NoiseRegression
from limbeck.sampling.methods.rf_plus_plus import RFPlusPlus
from limbeck.sampling.methods.sana_sprint import SanaSprint
from limbeck.sampling.trajectories import TeacherPairs, solver_step
from limbeck.schema import Training
from limbeck.zoo import build
from limbeck.zoo.guided import Guided, _Attention

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
PROCESSES = {"flow": FLOW, **{name: make_process(name) for name in ("cosine", "edm", "ddpm")}}


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


@pytest.mark.parametrize("name,kind", [("flow", "velocity"), ("cosine", "v"), ("cosine", "velocity"), ("edm", "noise"), ("ddpm", "noise")])
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
    assert float(loss(method, pictures(std=1e-6)).detach()) < 1e-9
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
def test_hyper_sd_stays_in_its_segment(progress, k, monkeypatch):
    method = opened(HyperSD(grid_steps=16, adversarial=0.0), teacher_of(FLOW), consistent(FLOW, "velocity"))
    ends, steps = [], []
    plain_jump, plain_step = hyper_sd.ddim_step, hyper_sd.solver_step
    monkeypatch.setattr(hyper_sd, "ddim_step", lambda p, x0, z, s: (ends.append(s), plain_jump(p, x0, z, s))[1])
    monkeypatch.setattr(hyper_sd, "solver_step", lambda d, x, t, r, *more: (steps.append((t, r)), plain_step(d, x, t, r, *more))[1])
    loss(method, pictures(512), clock=SimpleNamespace(step=0, progress=progress))
    (end, same), ((t, r),) = ends, steps
    place, stop, near = ((16 * (1 - v)).round().long() for v in (t, end, r))
    long = 16 // k
    assert torch.equal(end, same) and torch.equal(near, place + 1)
    last = (place // long + 1) * long
    assert bool((stop == last)[near < last].any())
    assert bool((stop >= near).all()) and bool((stop <= last).all())
    assert set((last - stop).tolist()) == set(range(long)) and set(place.tolist()) == set(range(16))


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


def agd(states="paths", scale=3.0, low=0.0, high=math.inf, **more):
    net = build("denoising-mlp", input_shape=SHAPE, classes=3, width=8, depth=2)
    for weights in net.parameters():  # its last layer is zero at first
        nn.init.normal_(weights, std=0.3)
    teacher = Denoiser(net, FLOW, classes=3).guided(scale, low, high)
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


# ---- networks of other processes ----

OTHERS = [("ddpm", "noise"), ("edm", "edm"), ("cosine", "v")]


def from_the_end(process, kind, wanted, off=0.0):
    """A student that stands at the noise end, is told t, and whose output stands for the clean sample `wanted(z, t)`."""

    def rule(x, t):
        end = torch.full_like(t, process.t_noise)
        if kind == "edm":  # it is fed the preconditioned state
            x = x * (process.highest**2 + 0.25) ** 0.5
        x0 = wanted(x / expand(process.scale(end), x), t)
        noise = (x - expand(process.alpha(end), x) * x0) / expand(process.sigma(end), x)
        return process.read(kind, x0, noise, end)

    return Denoiser(Known(rule, off), process, kind, code="time")


@pytest.mark.parametrize("name,kind", OTHERS)
def test_boot_under_other_processes(name, kind):
    process = PROCESSES[name]

    def signal(z, t):
        end = torch.full_like(t, process.t_noise)
        state = moved(process, z * expand(process.scale(end), z), end, t)
        return (state - expand(process.sigma(t), z) * z) / expand(process.alpha(t), z)

    values = []
    for delta in (0.04, 0.02):
        method = opened(BOOT(delta=delta, beta=0.0, least=0.2), teacher_of(process, kind), from_the_end(process, kind, signal), 1024)
        values.append(float(loss(method)))
    assert values[0] < 1e-5 and values[1] < values[0] / 8
    made = opened(BOOT(), teacher_of(process, kind), from_the_end(process, kind, signal)).finish(from_the_end(process, kind, signal))
    z = torch.randn(16, *SHAPE)
    assert made.options["end"] == pytest.approx(float(process.at(torch.tensor(0.01))))
    least = process.at(torch.full((16,), 0.01))
    assert torch.allclose(made.from_noise(z, None, 1), signal(z, least), atol=1e-6)


@pytest.mark.parametrize("name,kind", OTHERS)
def test_freeflow_under_other_processes(name, kind):
    process = PROCESSES[name]
    student = from_the_end(process, kind, lambda z, t: z - flow_map(z, FLOW.time_at(process.angle(t))))
    method = opened(FreeFlow(share=1.0, power=0.0), teacher_of(process, kind), student)
    # a process that ends before pure noise cannot be told the first per cent of the way
    assert float(loss(method)) < 2e-4
    z, way = torch.randn(16, *SHAPE), torch.rand(16) * 0.8 + 0.1
    assert torch.allclose(method.average(z, way, None), -flow_map(z, 1 - way), atol=1e-6)
    reached = z + expand(way, z) * method.average(z, way, None)
    arriving = method.average(z, way, None) + expand(way, z) * method.slope(z, way, None)
    assert torch.allclose(arriving, -method._teacher.velocity(reached, 1 - way, None), atol=1e-5)


@pytest.mark.parametrize("name,kind", OTHERS)
def test_sana_sprint_under_other_processes(name, kind):
    process = PROCESSES[name]
    student = consistent(process, kind)
    if kind == "edm":
        inner = student.network.rule
        student.network.rule = lambda x, t: inner(x * expand((t**2 + 0.25).sqrt(), x), t)
    method = opened(SanaSprint(adversarial=0.0, spread=0.7), teacher_of(process, kind), student)
    assert float(loss(method, pictures())) < 1e-9


# ---- adversarial, reward and perceptual terms ----


def tapped(method, classes=0, **more):
    """A method on a random network with stages, its teacher frozen; `calls` counts the teacher's passes."""
    net = build("denoising-mlp", input_shape=SHAPE, classes=classes, width=8, depth=2)
    for weights in net.parameters():
        nn.init.normal_(weights, std=0.3)
    student = Denoiser(copy.deepcopy(net), FLOW, classes=classes)
    method = opened(method, Denoiser(net.requires_grad_(False), FLOW, classes=classes), student, 16)
    method.calls = []
    net.register_forward_hook(lambda *args: method.calls.append(1))
    return method


@pytest.mark.parametrize("order,calls", [(1, 3), (2, 4)])
def test_hyper_sd_adversarial(order, calls):
    method = tapped(HyperSD(grid_steps=16, adversarial=0.3, order=order))
    student, heads, teacher = method.pair.student.network, method.parts["heads"], method.pair.teacher
    batch = pictures(16)
    terms = method.losses("student", batch, SimpleNamespace(step=0, progress=0.3))  # four segments
    features, aim, end, _ = method._jumped
    assert float(terms["adversarial"].detach()) == pytest.approx(-0.3 / 4 * float(heads(features).mean()))
    terms["adversarial"].backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in student.parameters() if p.grad is not None)
    assert all(p.grad is None and p.requires_grad for p in heads.parameters())
    student.zero_grad(set_to_none=True)
    (critic,) = method.losses("critic", batch, LATE).values()
    assert len(method.calls) == calls  # the solver, and one pass each for features of the prediction and of its aim
    real = heads(teacher.features(aim, end, None)[0])
    assert float(critic.detach()) == pytest.approx(float(((1 - real).relu().mean() + (1 + heads(features)).relu().mean()).detach()))
    critic.backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is None for net in (student, teacher.network, method.parts["target"]) for p in net.parameters())


def test_hyper_sd_reward():
    method = tapped(HyperSD(grid_steps=16, adversarial=0.0, reward="ink", reward_weight=0.2, margin=50.0))
    batch, late = pictures(16), SimpleNamespace(step=0, progress=0.8)
    assert "reward" not in method.losses("student", batch, SimpleNamespace(step=0, progress=0.75))
    late_ones, plain = [], method._late
    method._late = lambda count: (late_ones.append(plain(count)), late_ones[-1])[1]
    term = method.losses("student", batch, late)["reward"]
    assert float(term.detach()) == pytest.approx(0.2 * (50 - float(late_ones[0].mean())))  # more ink costs less
    term.backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in method.pair.student.network.parameters() if p.grad is not None)
    method.margin = -50.0
    assert float(method.losses("student", batch, late)["reward"].detach()) == 0
    method.pair.student.network = watched = Known(lambda x, t: told.append((float(t[0]), torch.is_grad_enabled())) or x * 0.5)
    lengths = set()
    for _ in range(40):
        told = []
        assert plain(4).requires_grad
        assert [t for t, _ in told] == [1.0, 0.75, 0.5, 0.25][: len(told)]
        assert [graph for _, graph in told] == [False] * (len(told) - 1) + [True]
        lengths.add(len(told))
    assert lengths == {1, 2, 3, 4} and watched.off.grad is None


@pytest.mark.parametrize("t", [0.1, 0.8])
def test_rectified_flow_weights_at_a_time(t, monkeypatch):
    monkeypatch.setattr(Flow, "draw", lambda self, count, *law: torch.full((count,), t))
    teacher, off, c = teacher_of(FLOW, std=0.0), 0.3, 0.00054 * 4
    student = consistent(FLOW, "velocity", off, 1e-9)
    huber = ((4 * off**2 + c**2) ** 0.5 - c) / 4
    assert float(loss(opened(RFPlusPlus(pairs=64), teacher, student)).detach()) == pytest.approx((1 - t) * huber, rel=1e-3)
    assert float(loss(opened(RFPlusPlus(pairs=64, loss="mse"), teacher, student)).detach()) == pytest.approx(off**2, rel=1e-3)
    method = opened(RFPlusPlus(pairs=64, perceptual=0.5), teacher, student)
    asked = []
    method._distance = lambda x, y, labels: (asked.append((x, y)), torch.full((len(x),), 3.0))[1]
    assert float(method.losses("student", None, LATE)["perceptual"]) == pytest.approx(0.5 * 3 / t, rel=1e-3)
    (seen, aim) = asked[0]
    assert torch.allclose(aim, torch.full_like(aim, MEAN), atol=1e-4) and torch.allclose(seen, aim - t * off, atol=1e-3)


def test_the_perceptual_distance():
    method = tapped(RFPlusPlus(pairs=8, teacher_steps=1))
    method.pair.teacher.network.requires_grad_(True)
    x, y = torch.randn(6, *SHAPE, requires_grad=True), torch.randn(6, *SHAPE)
    assert float(method._distance(x, x.detach(), None).abs().max().detach()) == 0
    far = method._distance(x, y, None)
    assert far.shape == (6,) and bool((far > 0).all())
    far.sum().backward()
    assert bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    assert all(p.grad is None and p.requires_grad for p in method.pair.teacher.network.parameters())


# ---- plain training ----

TARGETS = {
    "x0": lambda a, s, x0, z: x0,
    "noise": lambda a, s, x0, z: z,
    "v": lambda a, s, x0, z: a * z - s * x0,
    "score": lambda a, s, x0, z: -z / s,
    "edm": lambda a, s, x0, z: (x0 * (s**2 + 0.25) - 0.25 * (x0 + s * z)) / (0.5 * s * (s**2 + 0.25).sqrt()),
    "velocity": lambda a, s, x0, z: z - x0,
}


@pytest.mark.parametrize("kind", TARGETS)
def test_the_target_of_plain_training(kind):
    process = {"edm": PROCESSES["edm"], "velocity": FLOW}.get(kind, PROCESSES["cosine"])

    def rule(x, t):  # the data is one point, so that a state tells its noise
        a, s = expand(process.alpha(t), x), expand(process.sigma(t), x)
        x = x * (s**2 + 0.25).sqrt() if kind == "edm" else x
        return TARGETS[kind](a, s, torch.full_like(x, MEAN), (x - a * MEAN) / s)

    def value(off):
        method = opened(DiffusionTraining(law="logit-normal"), None, Denoiser(Known(rule, off), process, kind, code="time"))
        return float(loss(method, pictures(std=0.0)).detach())

    assert value(0.0) < 1e-12 and value(0.4) == pytest.approx(0.16, rel=1e-4)


def test_plain_training_hides_labels_and_knows_laws():
    told = []
    network = Known(lambda x, t: x)
    network.forward = lambda x, level, label: (told.append((level, label)), x + network.off)[1]
    method = opened(DiffusionTraining(), None, Denoiser(network, FLOW, classes=4, code="time"))
    method.pair.spec.label_dropout = 0.25
    labels = torch.randint(4, (8000,))
    batch = Batch(torch.randn(8000, *SHAPE), labels, None)
    loss(method, batch)
    level, seen = told.pop()
    hidden = seen == 4
    assert float(hidden.double().mean()) == pytest.approx(0.25, abs=0.02) and torch.equal(seen[~hidden], labels[~hidden])
    assert abs(float(labels[hidden].double().mean()) - 1.5) < 0.1
    assert float(level.mean()) == pytest.approx(0.5, abs=0.02) and float(level.std()) == pytest.approx(12**-0.5, abs=0.01)
    method.pair.spec.label_dropout, method.law = 0.0, "log-normal"
    loss(method, batch)
    level, seen = told.pop()
    ratio = (level / (1 - level)).log()
    assert torch.equal(seen, labels)
    assert float(ratio.mean()) == pytest.approx(-1.2, abs=0.06) and float(ratio.std()) == pytest.approx(1.2, abs=0.05)


# ---- adapters ----


def test_agd_attention():
    method = agd(form="attention")
    x, t, labels, _, _ = method._kept
    network = method.pair.student.network
    assert all(isinstance(adapter, _Attention) for adapter in network.adapters)
    assert torch.allclose(method.pair.student.raw(x, t, labels), method.pair.teacher.guided(1.0).raw(x, t, labels))
    adapter = network.adapters[0]
    nn.init.normal_(adapter.out.weight)
    nn.init.normal_(adapter.out.bias)
    tokens, told = torch.randn(5, 7, 8), torch.randn(5, 3, 8)
    aim = adapter.out(nn.functional.scaled_dot_product_attention(adapter.query(tokens), adapter.key(told), adapter.value(told)))
    assert torch.allclose(adapter(tokens, told), aim)
    assert adapter.query.bias is None and adapter.key.bias is None and adapter.value.bias is None
    loss(method).backward()
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in (adapter.query, adapter.key, adapter.value, adapter.out))


class Picture(nn.Module):
    """One stage of pictures `(B, C, H, W)` or of tokens `(B, L, D)`."""

    taps = ("stage",)

    def __init__(self, tokens):
        super().__init__()
        self.stage, self.tokens = nn.Identity(), tokens

    def forward(self, x, level, label=None):
        x = torch.cat([x, 2 * x, -x], 1)
        if not self.tokens:
            return self.stage(x)[:, :1]
        return self.stage(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)[:, :1]


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("form", ["additive", "attention"])
def test_adapters_on_maps_and_tokens(tokens, form):
    network = Guided(SHAPE, 3, Picture(tokens), None, 8, form, 2.5)
    x, level, label = torch.randn(4, *SHAPE), torch.rand(4), torch.tensor([0, 1, 2, 3])
    assert torch.equal(network(x, level, label), x)
    (adapter,) = network.adapters
    last = adapter.layers[-1] if form == "additive" else adapter.out
    nn.init.normal_(last.weight)
    told = torch.stack([network.by_scale(torch.full((4,), 2.5)), network.by_level(level), network.by_label(label)], 1)
    inside = torch.cat([x, 2 * x, -x], 1).flatten(2).transpose(1, 2)
    if form == "additive":
        aim = inside + adapter.layers(told[:, 0] + told[:, 1] + told[:, 2])[:, None]
    else:
        aim = inside + adapter(inside, told)
    assert torch.allclose(network(x, level, label), aim.transpose(1, 2).reshape(4, 3, 2, 2)[:, :1])
    assert torch.equal(network(x, level), x)  # nothing to guide by
    assert not network.inner.stage._forward_hooks


def test_scalars_are_told_by_cosines():
    embed = agd().pair.student.network.by_scale
    value = torch.tensor([1.0, 2.5])
    assert torch.allclose(embed(value), embed.layers((2 * math.pi * (value[:, None] * embed.frequencies[None] + embed.phases)).cos()))
    assert float(embed.phases.min()) >= 0 and float(embed.phases.max()) < 1 and not embed.frequencies.requires_grad


def free_and_given(method, x, t, labels):
    plain = method.pair.teacher.guided(1.0)
    return plain.raw(x, t, torch.full_like(labels, 3)), plain.raw(x, t, labels)


@pytest.mark.parametrize("low,high", [(0.0, math.inf), (0.5, 2.0)])
def test_agd_on_noised_pictures(low, high):
    method = agd(states="noised", low=low, high=high, w_max=5.0)
    assert method.needs_pictures() and not AGD().needs_pictures()
    asked, scales, plain = [], [], method.pair.student.raw
    method.pair.student.raw = lambda x, t, labels: (asked.append((x, t, labels)), plain(x, t, labels))[1]
    method.pair.student.network.by_scale.register_forward_hook(lambda m, args, out: scales.append(args[0]))
    labels = torch.randint(3, (2000,))
    value = float(loss(method, Batch(MEAN + 0 * torch.randn(2000, *SHAPE), labels, None)).detach())
    (x, t, same), scale = asked[0], scales[0]
    assert torch.equal(same, labels) and float(scale.min()) < 1.05 and float(scale.max()) > 4.95
    noise = (x - expand(1 - t, x) * MEAN) / expand(t, x)
    assert (
        float(noise.mean().abs()) < 0.05
        and float(noise.std()) == pytest.approx(1, abs=0.05)
        and float(t.mean()) == pytest.approx(0.5, abs=0.05)
    )
    free, given = free_and_given(method, x, t, labels)
    inside = (t / (1 - t) >= low) & (t / (1 - t) <= high)
    # the adapters add nothing yet: what is left is the guidance itself
    assert value == pytest.approx(float((expand((scale - 1) * inside, x) * (given - free)).square().mean()))


def test_agd_keeps_the_guidance_interval_and_may_train_all():
    method = agd(low=0.6, high=1.8)  # times 1, 2/3, 1/3: sigma/alpha inf, 2, 1/2
    x, t, labels, scale, aim = method._kept
    assert torch.allclose(aim, free_and_given(method, x, t, labels)[1])
    method = agd(low=0.6)
    x, t, labels, scale, aim = method._kept
    free, given = free_and_given(method, x, t, labels)
    assert torch.allclose(aim, torch.where(expand(t > 0.5, x), free + expand(scale, x) * (given - free), given))
    for whole in (False, True):
        method = agd(whole=whole)
        method.pair.training = Training()
        network = method.pair.student.network
        trained = {id(p) for group in method.optimizers(method.pair)["student"].param_groups for p in group["params"]}
        inner = {id(p) for p in network.inner.parameters()}
        assert (inner <= trained) if whole else not (inner & trained)
        assert {id(p) for p in network.learning()} <= trained and len(trained) < len(list(network.parameters())) + 1
        loss(method).backward()
        assert all((p.grad is not None) == whole for p in network.inner.blocks.parameters())
