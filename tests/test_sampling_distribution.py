"""Score matching, adversarial and after-distillation methods of the sampling wing: closed forms, hand-written gradients and rules."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from limbeck import method as registry
from limbeck import schema
from limbeck.data import open_data
from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, Mixture, exact_denoiser, make_process
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.losses import gaussian_mmd, score_identity
from limbeck.sampling.critics import Heads, RandomEmbeddings, middle_of, widths_of
from limbeck.sampling.few_step import Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.hybrid import hybrid_sample, switch
from limbeck.sampling.methods import decoupled_dmd, few_step_sid, gdd
from limbeck.sampling.methods.pso import step_log_density
from limbeck.sampling.pictures import Pictures
from limbeck.sampling.program import SamplingProgram
from limbeck.sampling.rewards import make_reward
from limbeck.zoo import build

SHAPE = (1, 2, 2)
KINDS = [("flow", "velocity"), ("ddpm", "noise"), ("cosine", "v"), ("edm", "edm"), ("edm", "x0"), ({"name": "flow", "shift": 3.0}, "x0")]


@pytest.fixture(autouse=True)
def double():
    """Closed forms are compared in float64; everything random is seeded."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def random_net(shape=SHAPE, classes=3, seed=0):
    net = build("denoising-mlp", input_shape=shape, classes=classes, width=8, depth=2).double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
    return net


def random_denoiser(process="flow", prediction="velocity", classes=3, seed=0, shape=SHAPE):
    return Denoiser(random_net(shape, classes, seed), make_process(process), prediction, classes=classes)


def gaussian(mean, std, process="flow", prediction="velocity"):
    means = torch.full((1, *SHAPE), float(mean))
    return exact_denoiser(Mixture(means, std), make_process(process), prediction)


def stand_in(shape=SHAPE, classes=3):
    """What methods use of `Pictures`."""
    real = torch.linspace(-1, 1, 40 * math.prod(shape)).reshape(40, *shape)
    return SimpleNamespace(
        shape=shape,
        classes=classes,
        random=lambda count: (real[torch.randint(40, (count,))], None),
        like=lambda labels: labels.reshape(-1, 1, 1, 1).double().expand(-1, *shape) + 0.1 * torch.randn(len(labels), *shape),
    )


def opened(id, teacher=None, student=None, steps=(1,), batch=8, pictures=None, setup=True, **settings):
    """A method that is bound and set up for tiny networks."""
    teacher = random_denoiser() if teacher is None else teacher
    teacher.network.eval().requires_grad_(False)
    student = teacher.with_network(copy.deepcopy(teacher.network).requires_grad_(True)) if student is None else student
    training = schema.Training(batch=batch, optimizer="adam", lr=1e-3)
    spec = schema.Generate(steps=list(steps))
    pictures = stand_in(classes=teacher.classes) if pictures is None else pictures
    pair = Pair(teacher, student, pictures, spec, training, 10, torch.device("cpu"))
    method = registry.make(id, settings)
    method.bind(pair)
    if setup:
        method.setup(pair)
    return method


def clock(step=0):
    return Clock(step, 10, 100)


def batch_of(count=8, shape=SHAPE, classes=3):
    return Batch(torch.randn(count, *shape), torch.randint(classes, (count,)), torch.arange(count))


def gradient(loss, x):
    """d numel / dx: the direction that a field loss stands for."""
    (g,) = torch.autograd.grad(loss, x)
    return g * x.numel()


def grown(module):
    return any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in module.parameters())


def untouched(module):
    return all(p.grad is None for p in module.parameters())


class Listening:
    """A denoiser that notes what it is asked."""

    def __init__(self, inner):
        self.inner, self.heard = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def x0(self, state, level, label=None):
        self.heard.append((level.clone(), label))
        return self.inner.x0(state, level, label)


# ---- DMD2 ----


def posterior(x, a, s, mean, std):
    return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)


@pytest.mark.parametrize("process,prediction", KINDS)
def test_dmd_direction_of_gaussians(process, prediction):
    """Generator N(m, s^2), teacher N(mu, s'^2): each sample's direction in closed form; on average it leads from m to mu."""
    m, s, mu, other = 1.5, 0.7, -0.5, 1.2
    teacher = gaussian(mu, other, process, prediction)
    method = opened("dmd2", teacher, gan=0.0, start=0.9 if process == "cosine" else 1.0)
    method.fake = gaussian(m, s, process, prediction)
    x = (m + s * torch.randn(4000, *SHAPE)).requires_grad_(True)
    torch.manual_seed(5)
    d = gradient(method.generator_losses(x, torch.ones(4000), None)["matching"], x)
    torch.manual_seed(5)
    own = teacher.process
    level = own.at(0.02 + 0.96 * torch.rand(4000))
    a, sigma = (v.reshape(-1, 1, 1, 1) for v in (own.alpha(level), own.sigma(level)))
    state = a * x.detach() + sigma * torch.randn_like(x)
    seen, fake = posterior(state, a, sigma, mu, other), posterior(state, a, sigma, m, s)
    size = (x.detach() - seen).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(d, (fake - seen) / size, rtol=1e-5, atol=1e-7)
    expected = (m - mu) * sigma**2 / (a**2 * other**2 + sigma**2)
    error = (d * size - expected).mean((1, 2, 3))
    assert float(error.mean().abs()) < 5 * float(error.std()) / 4000**0.5
    assert float(d.mean()) > 0.1  # x moves along -d: down, from 1.5 towards -0.5
    method.fake = gaussian(mu, other, process, prediction)
    assert float(gradient(method.generator_losses(x, torch.ones(4000), None)["matching"], x).abs().max()) < 1e-6


def test_dmd_guides_the_teacher_alone():
    """d = (X_F - X_T^w) / mean|x - X_T^w| with the fake network unguided, and no gradient through either."""
    teacher = random_denoiser().guided(3.0)
    method = opened("dmd2", teacher, gan=0.0)
    with torch.no_grad():
        method.fake.network.out.weight.add_(0.1)
    x, labels = torch.randn(6, *SHAPE, requires_grad=True), torch.randint(3, (6,))
    torch.manual_seed(1)
    d = gradient(method.generator_losses(x, torch.ones(6), labels)["matching"], x)
    torch.manual_seed(1)
    level = 0.02 + 0.96 * torch.rand(6)
    with torch.no_grad():
        state = teacher.process.diffuse(x, torch.randn_like(x), level)
        plain = teacher.guided(1.0)
        free = plain.x0(state, level, torch.full_like(labels, 3))
        seen = free + 3.0 * (plain.x0(state, level, labels) - free)
        fake = method.fake.x0(state, level, labels)
    assert method.fake.guidance.scale == 1.0
    assert torch.allclose(d, (fake - seen) / (x - seen).abs().mean((1, 2, 3), keepdim=True).detach(), atol=1e-10)


def test_levels_belong_to_the_teachers_process():
    """A flow student of a DDPM teacher is compared at the teacher's times, within the bounds."""
    method = opened("dmd2", random_denoiser("ddpm", "noise"), random_denoiser("flow"), gan=0.0)
    t = method.levels(4000)
    assert 19 < float(t.min()) < 25 and 974 < float(t.max()) < 979.01
    whole = method.levels(4000, 0.0, 1.0)
    assert float(whole.min()) < 10 and float(whole.max()) > 990


# ---- generator inputs ----


@pytest.mark.parametrize("process", ["flow", "ddpm-scaled", "edm"])
@pytest.mark.parametrize("start", [1.0, 0.625])
def test_backward_simulation_visits_the_samplers_times(process, start):
    """Training inputs lie exactly at the times that the finished generator visits, each as often; the first state is sampling's own."""
    method = opened("dmd2", gaussian(0.3, 0.5, process, "x0"), steps=(4,), gan=0.0, start=start)
    generator = method.finish(method.pair.student)
    wanted = generator.times(4)[:-1].tolist()
    counts = dict.fromkeys(wanted, 0)
    for _ in range(200):
        counts[float(method.inputs(1)[1])] += 1
    assert set(counts) == set(wanted) and min(counts.values()) > 25
    one = opened("dmd2", gaussian(0.3, 0.5, process, "x0"), steps=(1,), gan=0.0, start=start)
    torch.manual_seed(3)
    state, t, _ = one.inputs(5)
    torch.manual_seed(3)
    noise = torch.randn(5, *SHAPE)
    own = one.pair.student.process
    size = own.scale(t) if start == 1.0 else own.sigma(t)
    assert torch.allclose(state, size.reshape(-1, 1, 1, 1) * noise, rtol=1e-6)
    assert torch.allclose(one.pair.student.x0(state, t), one.finish(one.pair.student).from_noise(noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_backward_simulation_has_the_samplers_states(process, monkeypatch):
    """States of an exact Gaussian student: mean and deviation by the recursion of predict-and-renoise."""
    mean, std = 0.8, 0.6
    method = opened("dmd2", gaussian(mean, std, process, "x0"), steps=(3,), gan=0.0)
    own, times = method.pair.student.process, method.times
    expected, variance = 0.0, float(own.scale(times[:1])) ** 2
    for walked in range(3):
        monkeypatch.setattr(torch, "randint", lambda *a, walked=walked, **k: torch.tensor([walked]))
        state, t, _ = method.inputs(20000)
        assert float(t[0]) == float(times[walked]) and not state.requires_grad
        assert abs(float(state.mean()) - expected) < 0.02 and abs(float(state.std()) - variance**0.5) < 0.02
        a, s = float(own.alpha(times[walked])), float(own.sigma(times[walked]))
        gain = a * std**2 / (a**2 * std**2 + s**2)
        if walked < 2:
            a2, s2 = float(own.alpha(times[walked + 1])), float(own.sigma(times[walked + 1]))
            expected = a2 * (mean + gain * (expected - a * mean))
            variance = a2**2 * gain**2 * variance + s2**2


def test_a_noise_network_cannot_begin_where_there_is_only_noise():
    with pytest.raises(UserError, match=r"alpha"):
        opened("dmd2", random_denoiser("cosine", "noise"), gan=0.0)
    opened("dmd2", random_denoiser("cosine", "noise"), gan=0.0, start=0.9)
    with pytest.raises(UserError, match=r"low must be below high"):
        opened("dmd2", low=0.5, high=0.5)


# ---- two time-scales, who learns what ----


def test_turns():
    """Ratio 5: the generator in every fifth step, the fake score in all, after it."""
    method = opened("dmd2", gan=0.0)
    assert [method.turns(clock(n)) for n in range(6)] == [("student", "fake"), *[("fake",)] * 4, ("student", "fake")]
    assert opened("dmd2", gan=0.0, ratio=1).turns(clock(7)) == ("student", "fake")


@pytest.mark.parametrize(
    "id,settings", [("dmd2", {"gan": 0.0}), ("dmd2", {"gan": 0.5}), ("few-step-sid", {}), ("few-step-sid", {"gan": 0.5})]
)
def test_each_turn_reaches_its_own_weights(id, settings):
    """The generator's loss leaves fake score, heads and teacher alone though it runs through them; theirs leave the generator."""
    method = opened(id, **settings)
    student, fake, teacher = method.pair.student.network, method.fake.network, method.pair.teacher.network
    with torch.no_grad():
        fake.out.weight.add_(0.1)
    terms = method.losses("student", batch_of(), clock(0))
    assert set(terms) == {"matching" if id == "dmd2" else "identity", *(["adversarial"] if method.gan else [])}
    sum(terms.values()).backward()
    assert grown(student) and untouched(method.parts) and untouched(teacher)
    assert all(p.requires_grad for p in method.parts.parameters())
    made = method.made
    student.zero_grad(set_to_none=True)
    heard = []
    losses = method.fake_losses
    method.fake_losses = lambda x, labels, batch: heard.append(x) or losses(x, labels, batch)
    terms = method.losses("fake", batch_of(), clock(0))
    assert set(terms) == {"fake", *(["critic"] if method.gan else [])}
    sum(terms.values()).backward()
    assert untouched(student) and untouched(teacher) and grown(fake)
    assert torch.equal(heard[0], made) and not heard[0].requires_grad  # the very samples of the generator's turn
    if method.gan:
        assert grown(method.parts["heads"])
        fake.zero_grad(set_to_none=True)
        method.losses("fake", batch_of(), clock(0))["critic"].backward()
        assert grown(fake.get_submodule("blocks.0"))  # the bottleneck learns to tell them apart
    method.losses("fake", batch_of(), clock(1))
    assert not torch.equal(heard[-1], made) and not heard[-1].requires_grad


def test_adversarial_gradient_reaches_the_samples():
    """gan * softplus(-C(F(x_s))), and the critic's loss has real pictures against generated ones."""
    method = opened("dmd2", gan=0.5, critic=0.2)
    x, labels = torch.randn(8, *SHAPE, requires_grad=True), torch.randint(3, (8,))
    torch.manual_seed(2)
    logits, raw, state, noise, t = method._logits(x, labels)
    torch.manual_seed(2)
    u = torch.rand(8)
    assert torch.equal(t, u) and torch.equal(noise, torch.randn_like(x))  # the whole range
    assert torch.allclose(state, method.fake.process.diffuse(x, noise, t))
    assert torch.allclose(raw, method.fake.raw(state, t, labels))
    assert float(torch.autograd.grad(logits.sum(), x)[0].abs().sum()) > 0
    batch = batch_of()
    torch.manual_seed(2)
    terms = method.fake_losses(x.detach(), labels, batch)
    torch.manual_seed(2)
    fake, raw, _, noise, _ = method._logits(x.detach(), labels)
    real = method._logits(batch.inputs, batch.labels)[0]
    assert torch.allclose(terms["fake"], (raw - (noise - x)).square().mean())
    assert torch.allclose(terms["critic"], 0.2 * (nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()))


def test_the_critics_pass_knows_a_view():
    """A cosine network read under a flow: the target of the shared pass is that of the plain denoising loss."""
    teacher = random_denoiser("cosine", "v").under(make_process("flow"))
    method = opened("dmd2", teacher, gan=0.5)
    x, labels = torch.randn(8, *SHAPE), torch.randint(3, (8,))
    torch.manual_seed(4)
    found = method.fake_losses(x, labels, batch_of())["fake"]
    torch.manual_seed(4)
    batch_of()  # drawn as above
    t = method.levels(8, 0.0, 1.0)
    assert torch.allclose(found, method.fake.denoising_loss(x, torch.randn_like(x), t, labels))


def test_the_critic_needs_labels_of_both_sides():
    with pytest.raises(UserError, match=r"told classes"):
        opened("dmd2", pictures=stand_in(classes=0), gan=0.5)


# ---- SiD ----


def test_sid_gradient(monkeypatch):
    """Through teacher, fake and x, against finite differences; the weight is held constant; nothing where fake and teacher agree."""
    teacher = random_denoiser()
    method = opened("few-step-sid", teacher, alpha=1.2)
    x, labels = torch.randn(3, *SHAPE, requires_grad=True), torch.tensor([0, 1, 2])

    def loss(x):
        torch.manual_seed(7)
        return method.generator_losses(x, torch.ones(3), labels)["identity"]

    assert float(torch.autograd.grad(loss(x), x)[0].abs().max()) < 1e-12  # the fake network is the teacher's copy
    with torch.no_grad():
        for p in method.fake.network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    (whole,) = torch.autograd.grad(loss(x), x)
    torch.manual_seed(7)
    level = 0.02 + 0.96 * torch.rand(3)
    state = teacher.process.diffuse(x, torch.randn_like(x), level)
    seen, fake = teacher.x0(state, level, labels), method.fake.x0(state, level, labels)
    weight = (x - seen).abs().mean((1, 2, 3), keepdim=True).detach()
    by_hand = ((seen - fake) * ((seen - x) - 1.2 * (seen - fake)) / weight).mean()
    assert torch.allclose(loss(x), by_hand)
    monkeypatch.setattr("limbeck.losses.generation.pixel_distance", lambda x, other: weight)
    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.allclose(torch.autograd.grad(loss(x), x)[0], whole)


@pytest.mark.parametrize("preset", ["plain", "long-short", "zero-cfg", "anti-cfg"])
def test_sid_presets(preset, monkeypatch):
    """Which network is guided how, in both turns."""
    teacher = random_denoiser().guided(2.5, 0.1, 5.0) if preset == "long-short" else random_denoiser()
    method = opened("few-step-sid", teacher, preset=preset)
    with torch.no_grad():
        method.fake.network.out.weight.add_(0.3)
    heard = {}
    monkeypatch.setattr(few_step_sid, "score_identity", lambda x, t, f, alpha: heard.update(t=t, f=f) or score_identity(x, t, f, alpha))
    x, labels, null = torch.randn(60, *SHAPE), torch.randint(3, (60,)), torch.full((60,), 3)
    torch.manual_seed(1)
    method.generator_losses(x, torch.ones(60), labels)
    torch.manual_seed(1)
    level = 0.02 + 0.96 * torch.rand(60)
    state = teacher.process.diffuse(x, torch.randn_like(x), level)
    plain, fake = teacher.guided(1.0), method.fake
    given, free = fake.x0(state, level, labels), fake.x0(state, level, null)
    ratio = (level / (1 - level)).reshape(-1, 1, 1, 1)
    w = torch.where((ratio >= 0.1) & (ratio <= 5.0), 2.5, 1.0)
    aim = {"plain": given, "long-short": free + w * (given - free), "zero-cfg": free, "anti-cfg": 2 * free - given}[preset]
    assert torch.allclose(heard["f"], aim)
    seen, blind = plain.x0(state, level, labels), plain.x0(state, level, null)
    assert torch.allclose(heard["t"], blind + w * (seen - blind) if preset == "long-short" else seen)
    torch.manual_seed(1)
    loss = method.fake_losses(x, labels, None)["fake"]
    torch.manual_seed(1)
    level = torch.rand(60)
    noise = torch.randn_like(x)
    state = fake.process.diffuse(x, noise, level)
    given, free = fake.raw(state, level, labels), fake.raw(state, level, null)
    ratio = (level / (1 - level)).reshape(-1, 1, 1, 1)
    w = torch.where((ratio >= 0.1) & (ratio <= 5.0), 2.5, 1.0)
    said = {"plain": given, "long-short": free + w * (given - free), "zero-cfg": free, "anti-cfg": 2 * free - given}[preset]
    assert torch.allclose(loss, (said - (noise - x)).square().mean())


def test_sid_presets_refuse_what_they_lack():
    with pytest.raises(UserError, match=r"generate.guidance"):
        opened("few-step-sid", preset="long-short")
    for preset in ("zero-cfg", "anti-cfg"):
        with pytest.raises(UserError, match=r"classes"):
            opened("few-step-sid", random_denoiser(classes=0), preset=preset)


@pytest.mark.parametrize("preset", ["zero-cfg", "anti-cfg"])
def test_sid_presets_keep_their_critic(preset):
    """The critic learns under every preset, and labels alone do not tell it real from generated."""
    method = opened("few-step-sid", preset=preset, gan=0.5)
    terms = method.losses("fake", batch_of(), clock(0))
    terms["critic"].backward()
    assert grown(method.parts["heads"])
    told = []
    method.parts["heads"].register_forward_pre_hook(lambda module, args: told.append(args[1]))
    method.losses("fake", batch_of(), clock(0))
    assert len(told) == 2 and all(int(labels.max()) < 3 for labels in told)


# ---- SwiftBrush ----


@pytest.mark.parametrize("process,prediction", [("ddpm", "noise"), ("ddpm", "v"), ("flow", "velocity"), ("edm", "edm")])
def test_swiftbrush_direction(process, prediction):
    """sigma^2 (eps_T - eps_F) = sigma alpha (X_F - X_T) in the variance-preserving form, the same guidance on both."""
    teacher = random_denoiser(process, prediction).guided(2.0)
    method = opened("swiftbrush", teacher, follower="full")
    with torch.no_grad():
        method.fake.network.out.weight.add_(0.3)
    x, labels = torch.randn(6, *SHAPE, requires_grad=True), torch.randint(3, (6,))
    torch.manual_seed(1)
    d = gradient(method.generator_losses(x, torch.ones(6), labels)["score"], x)
    torch.manual_seed(1)
    level = teacher.process.at(0.02 + 0.96 * torch.rand(6))
    angle = teacher.process.angle(level).reshape(-1, 1, 1, 1)
    state = teacher.process.diffuse(x, torch.randn_like(x), level).detach()
    fake = method.fake.guided(2.0)
    assert torch.allclose(
        d, angle.sin() * angle.cos() * (fake.x0(state, level, labels) - teacher.x0(state, level, labels)), rtol=1e-4, atol=1e-6
    )
    if process == "ddpm":
        sigma = teacher.process.sigma(level).reshape(-1, 1, 1, 1)
        assert torch.allclose(d, sigma**2 * (teacher.noise(state, level, labels) - fake.noise(state, level, labels)), rtol=1e-6, atol=1e-9)


def test_swiftbrush_without_follower_is_score_distillation():
    """The injected noise stands in for the fake score; nobody else learns."""
    teacher = random_denoiser("ddpm", "noise").guided(2.0)
    method = opened("swiftbrush", teacher, follower="none")
    assert method.turns(clock()) == ("student",) and set(method.optimizers(method.pair)) == {"student"}
    x, labels = torch.randn(6, *SHAPE, requires_grad=True), torch.randint(3, (6,))
    torch.manual_seed(1)
    d = gradient(method.generator_losses(x, torch.ones(6), labels)["score"], x)
    torch.manual_seed(1)
    level = teacher.process.at(0.02 + 0.96 * torch.rand(6))
    noise = torch.randn_like(x)
    state = teacher.process.diffuse(x, noise, level).detach()
    sigma = teacher.process.sigma(level).reshape(-1, 1, 1, 1)
    assert torch.allclose(d, sigma**2 * (teacher.noise(state, level, labels) - noise), rtol=1e-6, atol=1e-9)


def test_swiftbrush_follower():
    """alpha^2 |eps_F - n|^2 over the whole range; labels are hidden for whole batches; ratio and gan are not ignored."""
    method = opened("swiftbrush", random_denoiser("ddpm", "noise"), follower="full", null=0.4, ratio=3)
    assert [method.turns(clock(n)) for n in (0, 1, 3)] == [("student", "fake"), ("fake",), ("student", "fake")]
    x, labels = torch.randn(8, *SHAPE), torch.randint(3, (8,))
    hidden = 0
    for seed in range(60):
        torch.manual_seed(seed)
        found = method.fake_losses(x, labels, None)["fake"]
        torch.manual_seed(seed)
        process = method.fake.process
        level, noise = process.at(torch.rand(8)), torch.randn_like(x)
        null = bool(torch.rand(()) < 0.4)
        hidden += null
        said = method.fake.noise(process.diffuse(x, noise, level), level, torch.full_like(labels, 3) if null else labels)
        alpha = process.alpha(level).reshape(-1, 1, 1, 1)
        assert torch.allclose(found, (alpha**2 * (said - noise) ** 2).mean(), atol=1e-9)
    assert 12 < hidden < 36
    with pytest.raises(UserError, match=r"no critic"):
        opened("swiftbrush", gan=0.1)
    with pytest.raises(UserError, match=r"one step"):
        opened("swiftbrush", steps=(2,))


def test_swiftbrush_adapters():
    """The follower starts as the teacher; only adapters learn, and the teacher has none."""
    pytest.importorskip("peft")
    method = opened("swiftbrush", rank=2)
    learning = [name for name, p in method.fake.network.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    assert {id(p) for g in method.optimizers(method.pair)["fake"].param_groups for p in g["params"]} == {
        id(p) for p in method.parts.parameters() if p.requires_grad
    }
    before = {name: p.clone() for name, p in method.fake.network.named_parameters()}
    x, t, labels = torch.randn(4, *SHAPE), torch.full((4,), 0.5), torch.randint(3, (4,))
    assert torch.allclose(method.fake.x0(x, t, labels), method.pair.teacher.x0(x, t, labels))
    optimizer = method.optimizers(method.pair)["fake"]
    for _ in range(2):
        method.losses("fake", None, clock(0))["fake"].backward()
        optimizer.step()
    after = dict(method.fake.network.named_parameters())
    assert all(torch.equal(before[n], after[n]) == ("lora_" not in n) for n in before)
    assert not any("lora_" in name for name, _ in method.pair.teacher.network.named_parameters())
    layer = next(m for m in method.fake.network.modules() if hasattr(m, "scaling") and m.scaling)
    assert list(layer.scaling.values()) == [108 / 64]


# ---- decoupled DMD ----


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.2, 2.0)])
@pytest.mark.parametrize("process", ["flow", "ddpm", "edm"])
def test_decoupled_dmd_is_guided_dmd(process, interval):
    """One draw and one W: the gradient of DMD with a guided teacher, to the last digits."""
    teacher = random_denoiser(process, "x0").guided(3.0, *interval)
    one, two = opened("decoupled-dmd", teacher, schedule="shared", gan=0.0), opened("dmd2", teacher, gan=0.0)
    with torch.no_grad():
        one.fake.network.out.weight.add_(0.1)
        two.fake.network.out.weight.add_(0.1)
    x, labels = torch.randn(12, *SHAPE, requires_grad=True), torch.randint(3, (12,))
    found = []
    for method in (one, two):
        torch.manual_seed(9)
        t = torch.full((12,), float(teacher.process.t_noise))
        found.append(gradient(method.generator_losses(x, t, labels)["matching"], x))
    assert float((found[0] - found[1]).abs().max()) < 1e-10 and float(found[0].abs().max()) > 0.01


def test_decoupled_dmd_sum_of_its_parts(monkeypatch):
    """With equal draws and no normaliser, matching + guidance = X_F - X_T^w: the factor of the guidance part is w - 1."""
    teacher = random_denoiser().guided(3.0)
    noise = torch.randn(5, *SHAPE)
    x, labels = torch.randn(5, *SHAPE, requires_grad=True), torch.randint(3, (5,))
    methods = {part: opened("decoupled-dmd", teacher, schedule="full", part=part) for part in ("both", "matching", "guidance")}
    monkeypatch.setattr(decoupled_dmd, "pixel_distance", lambda x, other: 1.0)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full((5,), 0.5))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    found = {}
    for part, method in methods.items():
        with torch.no_grad():
            method.fake.network.out.weight.add_(0.1)
        found[part] = gradient(method.generator_losses(x, torch.ones(5), labels)["matching"], x)
    level = torch.full((5,), 0.5)
    state = teacher.process.diffuse(x, noise, level).detach()
    expected = methods["both"].fake.x0(state, level, labels) - teacher.x0(state, level, labels)
    assert torch.allclose(found["both"], expected, atol=1e-10)
    assert torch.allclose(found["matching"] + found["guidance"], expected, atol=1e-10)


@pytest.mark.parametrize("process", ["flow", "ddpm", "edm", {"name": "flow", "shift": 3.0}])
@pytest.mark.parametrize("schedule", ["hybrid", "constrained", "full", "shared"])
def test_decoupled_dmd_levels(process, schedule):
    """Constrained levels are cleaner than the generator's step; each part has a draw of its own but in "shared"."""
    method = opened("decoupled-dmd", random_denoiser(process, "x0").guided(2.0), schedule=schedule)
    method.teacher = Listening(method.teacher)
    own, count = method.teacher.process, 400
    x, labels = torch.randn(count, *SHAPE), torch.randint(3, (count,))
    step = own.at(torch.full((count,), 0.25))
    method.generator_losses(x, step, labels)
    guiding = next(level for level, label in method.teacher.heard if int(label.min()) == 3)
    matching = method.teacher.heard[0][0]
    assert torch.equal(guiding, matching) == (schedule == "shared")
    top, low, high = float(step[0]), float(own.at(torch.tensor(0.02))), float(own.at(torch.tensor(0.98)))
    for level, constrained in ((guiding, schedule in ("hybrid", "constrained")), (matching, schedule == "constrained")):
        assert float(level.min()) >= low - 1e-6 and float(level.max()) <= (top if constrained else high) + 1e-6
        ends = own.place(level.max()), own.place(level.min())
        assert float(ends[0]) > (0.24 if constrained else 0.95) and float(ends[1]) < 0.05


def test_decoupled_dmd_normalises_each_part_by_its_own_draw():
    """Hybrid: W of each part is mean|x - X_T| at that part's state, not the guided one."""
    teacher = random_denoiser().guided(3.0)
    method = opened("decoupled-dmd", teacher)
    with torch.no_grad():
        method.fake.network.out.weight.add_(0.1)
    x, labels, t = torch.randn(5, *SHAPE, requires_grad=True), torch.randint(3, (5,)), torch.full((5,), 0.5)
    torch.manual_seed(2)
    d = gradient(method.generator_losses(x, t, labels)["matching"], x)
    torch.manual_seed(2)
    plain, expected = teacher.guided(1.0), 0.0
    for part, high in (("matching", 0.98), ("guidance", 0.5)):
        level = 0.02 + (high - 0.02) * torch.rand(5)
        state = teacher.process.diffuse(x, torch.randn_like(x), level).detach()
        seen = plain.x0(state, level, labels)
        other = method.fake.x0(state, level, labels) if part == "matching" else plain.x0(state, level, torch.full_like(labels, 3))
        size = (x - seen).abs().mean((1, 2, 3), keepdim=True)
        expected = expected + ((other - seen) if part == "matching" else -2.0 * (seen - other)) / size
    assert torch.allclose(d, expected.detach(), atol=1e-10)


def test_decoupled_dmd_needs_guidance():
    with pytest.raises(UserError, match=r"guidance"):
        opened("decoupled-dmd")
    opened("decoupled-dmd", part="matching")


# ---- GDD ----

FROZEN = {
    "denoising-mlp": ({"width": 8, "depth": 2}, {f"blocks.{b}.layers.{n}.weight" for b in (0, 1) for n in (0, 2)}, set()),
    "dit": (
        {"dim": 8, "depth": 1, "heads": 2},
        {"blocks.0.attention.project.weight", "blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight"},
        {"blocks.0.attention.qkv.weight"},
    ),
}


def gdd_method(monkeypatch, network="denoising-mlp", args=None, **settings):
    """GDD with an untrained classifier in its critic."""
    rng = torch.Generator().manual_seed(3)
    classifier = build("convnet", input_shape=(1, 8, 8), classes=3, width=4, depth=2).double()
    monkeypatch.setattr(gdd, "feature_network", lambda *a: classifier)
    net = build(network, input_shape=(1, 8, 8), classes=3, **(args or {"width": 8, "depth": 2})).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.1)
    teacher = Denoiser(net, make_process("flow"), "velocity", classes=3)
    return opened("gdd", teacher, pictures=stand_in((1, 8, 8)), **settings)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("network", [*FROZEN, "unet"])
def test_gdd_freezes_what_it_promises(network, level, monkeypatch):
    """Names of the frozen weights; they are in no optimiser, and are frozen again if somebody frees them."""
    args, large, asking = FROZEN.get(network, ({"width": 8}, None, None))
    method = gdd_method(monkeypatch, network, args, freeze=level)
    student = method.pair.student.network
    if large is None:  # the U-Net, by what its parts are
        inside = [n for n, p in student.named_parameters() if p.ndim > 1 and n.startswith(("down", "bottleneck", "up"))]
        large = {n for n in inside if "convolution" in n or "project" in n}
        asking = {n for n in inside if "qkv" in n}
        assert (
            large and asking and {n for n in inside if n not in large | asking} == {n for n in inside if "modulate" in n or "shortcut" in n}
        )
    expected = set() if level == 0 else large if level == 1 else large | asking
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == expected
    learning = {id(p) for g in method.optimizers(method.pair)["student"].param_groups for p in g["params"]}
    assert learning == {id(p) for n, p in student.named_parameters() if n not in expected}
    student.requires_grad_(True)
    method.after_step(clock())
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == expected


def test_gdd_spares_attention_projections_by_their_names_in_diffusers(monkeypatch):
    method = gdd_method(monkeypatch)
    net = nn.Module()
    net.stage = nn.ModuleDict({n: nn.Linear(2, 2) for n in ("to_q", "to_k", "to_v", "to_out", "conv1", "time_emb_proj", "conv_shortcut")})
    assert {n.split(".")[1] for n in method.keep(net, ["stage"])} == {"to_out", "conv1"}


def test_gdd_penalty(monkeypatch):
    """Every 16th critic update, with weight 16, against a double backward pass written by hand."""
    method = gdd_method(monkeypatch, gamma=0.3)
    critic, batch = method.parts["critic"], batch_of(6, (1, 8, 8))
    for step in range(34):
        terms = method.losses("critic", batch, clock(step))
        assert ("penalty" in terms) == (step in (0, 16, 32)), step
    terms = method.losses("critic", batch, clock(0))
    x = batch.inputs.clone().requires_grad_(True)
    by_hand = 0.0
    for b in range(6):
        one = critic(x[b : b + 1], batch.labels[b : b + 1]).sum()
        (slope,) = torch.autograd.grad(one, x, create_graph=True)
        by_hand = by_hand + (slope[b] ** 2).sum() / 6
    by_hand = 0.3 / 2 * 16 * by_hand
    assert torch.allclose(terms["penalty"], by_hand)
    heads = list(critic.heads.parameters())
    a, b = (torch.autograd.grad(v, heads, allow_unused=True) for v in (terms["penalty"], by_hand))
    assert all((p is None and q is None) or torch.allclose(p, q) for p, q in zip(a, b)) and any(p is not None for p in a)
    assert not batch.inputs.requires_grad
    assert "penalty" not in gdd_method(monkeypatch, gamma=0.0).losses("critic", batch, clock(0))


def test_gdd_turns_reach_their_own_weights(monkeypatch):
    """One call at the noise end; the critic's classifier and random projection never learn."""
    method = gdd_method(monkeypatch)
    student, critic, batch = method.pair.student, method.parts["critic"], batch_of(6, (1, 8, 8))
    assert method.turns(clock(3)) == ("student", "critic")
    torch.manual_seed(1)
    loss = method.losses("student", batch, clock(0))["adversarial"]
    torch.manual_seed(1)
    labels, noise = torch.randint(3, (6,)), torch.randn(6, 1, 8, 8)
    assert torch.allclose(method.made, noise - student.network(noise, torch.ones(6), labels), atol=1e-6)
    assert torch.allclose(loss, nn.functional.softplus(-critic(method.made, labels)).mean(), atol=1e-6)
    loss.backward()
    assert grown(student.network) and untouched(critic)
    student.network.zero_grad(set_to_none=True)
    terms = method.losses("critic", batch, clock(1))
    terms["critic"].backward()
    assert untouched(student.network) and grown(critic.heads) and untouched(critic.classifier) and untouched(critic.random)
    learning = {id(p) for g in method.optimizers(method.pair)["critic"].param_groups for p in g["params"]}
    assert learning == {id(p) for p in critic.heads.parameters()}
    assert "instance" in gdd_method(monkeypatch, imitate=1.0).losses("student", batch, clock(0))


# ---- embedding loss ----


def test_embedding_loss_adds_to_its_host():
    """The host's terms keep their values; the new term reaches the generator alone; real pictures are of the same classes."""
    settings = {"host_settings": {"gan": 0.0, "ratio": 2}}
    method, host = opened("embedding-loss", pictures=stand_in((1, 8, 8)), teacher=random_denoiser(shape=(1, 8, 8)), **settings), None
    host = opened("dmd2", pictures=method.pair.pictures, teacher=method.pair.teacher, gan=0.0, ratio=2)
    assert [method.turns(clock(n)) for n in range(3)] == [host.turns(clock(n)) for n in range(3)]
    for part in (method, host):
        with torch.no_grad():
            part.parts["fake"].out.weight.add_(0.1)
    asked = []
    like = method.pair.pictures.like
    method.pair.pictures.like = lambda labels: asked.append(labels) or like(labels)
    torch.manual_seed(6)
    terms = method.losses("student", None, clock(0))
    torch.manual_seed(6)
    expected = host.losses("student", None, clock(0))
    assert set(terms) == {*expected, "embedding"} and all(torch.equal(terms[n], expected[n]) for n in expected)
    assert torch.equal(asked[0], host.live[1]) and torch.equal(method.made, host.made)
    terms["embedding"].backward()
    assert grown(method.pair.student.network) and untouched(method.parts)
    assert all(untouched(n) for n in method._embeddings.networks)
    assert "embedding" not in method.losses("fake", None, clock(0))
    assert set(method.parts) == {"fake"} and set(method.optimizers(method.pair)) == {"student", "fake"}


@pytest.mark.parametrize("kernel,networks", [("gaussian", 1), ("linear", 6)])
def test_embedding_loss_value(kernel, networks):
    """weight * mean over networks of the discrepancy, networks drawn anew (two in one step do not disturb each other's graph)."""
    settings = {"host_settings": {"gan": 0.0}, "kernel": kernel, "networks": networks, "weight": 3.0}
    method = opened("embedding-loss", pictures=stand_in((1, 8, 8)), teacher=random_denoiser(shape=(1, 8, 8)), **settings)
    drawn, real = [], []
    draw, like = method._embeddings.draw, method.pair.pictures.like
    method._embeddings.draw = lambda: drawn.append(draw()) or drawn[-1]

    def note(labels):
        real.append(like(labels))
        return real[-1]

    method.pair.pictures.like = note
    term = method.losses("student", None, clock(0))["embedding"]
    term.backward()
    with torch.no_grad():
        distance = gaussian_mmd if kernel == "gaussian" else lambda u, v: (u.mean(0) - v.mean(0)).square().sum()
        values = [distance(net(method.made), net(real[0])) for net in drawn]
    assert len(drawn) == networks and torch.allclose(term, 3.0 * torch.stack(values).mean())
    method.losses("student", None, clock(0))
    first, second = drawn[0], next(n for n in drawn[1:] + [draw() for _ in range(20)] if type(n) is type(drawn[0]))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_embedding_loss_is_its_host_otherwise():
    """Pictures are asked for as the host asks, checkpoints hold the host's state, and strange hosts are refused."""
    method = opened("embedding-loss", setup=False, host_settings={"gan": 0.0})
    assert not method.needs_pictures() and opened("embedding-loss", setup=False, host_settings={"gan": 0.1}).needs_pictures()
    method.state = {"a": 1}
    assert method._host.state == {"a": 1}
    assert registry.make("embedding-loss", {"host": "swiftbrush", "host_settings": {}}).one_step
    for host in ("embedding-loss", "diversity-distillation", "pso", "diffusion-training"):
        with pytest.raises(UserError, match=r"cannot help"):
            registry.make("embedding-loss", {"host": host, "host_settings": {}})


# ---- PSO ----


def test_step_log_density():
    """Mean over pixels of the normal log-density."""
    made, x0 = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    alpha, sigma = torch.rand(4) + 0.1, torch.rand(4) + 0.1
    expand = lambda v: v.reshape(-1, 1, 1, 1)  # noqa: E731
    law = torch.distributions.Normal(expand(alpha) * x0, expand(sigma).expand_as(x0))
    assert torch.allclose(step_log_density(made, x0, alpha, sigma), law.log_prob(made).mean((1, 2, 3)))


def moved(method, size=0.02):
    with torch.no_grad():
        rng = torch.Generator().manual_seed(2)
        for p in method.pair.student.network.parameters():
            p.add_(size * torch.randn(p.shape, generator=rng))


def test_pso_reward_rules():
    """Neutral pairs: log 2 and no gradient. Several rewards: one sample must be better in all of them."""
    method = opened("pso", steps=(3,), batch=6)
    moved(method)
    for rewards, sign in (
        ([[1.0], [0.0]], 1),
        ([[0.0], [1.0]], -1),
        ([[1.0], [1.0]], 0),
        ([[1.0, 0.0], [0.0, 1.0]], 0),
        ([[1.0, 2.0], [0.0, 1.0]], 1),
        ([[0.0, 1.0], [1.0, 1.0]], 0),
        ([[0.0, 1.0], [1.0, 2.0]], -1),
    ):
        rolls = iter(rewards)
        method._reward = lambda x, rolls=rolls: torch.tensor(next(rolls)).expand(6, -1).squeeze(-1)
        torch.manual_seed(8)
        loss = method.losses("student", None, clock(0))["preference"]
        torch.manual_seed(8)
        labels = method.pair.labels(6)
        rolled = [method._roll(labels, 6)[0] for _ in range(2)]
        value = 0.0
        for n in (0, 1):
            gain = sign * (method._ratio(rolled[0], n, labels).log() - method._ratio(rolled[1], n, labels).log())
            value = value + -nn.functional.logsigmoid(50.0 * gain).mean() / 2
        assert torch.allclose(loss, value)
        method.pair.student.network.zero_grad(set_to_none=True)
        loss.backward()
        if sign == 0:
            assert math.isclose(loss.item(), math.log(2)) and not grown(method.pair.student.network)
        else:
            assert grown(method.pair.student.network)


def test_pso_raises_the_better_sample(monkeypatch):
    """A step along the gradient makes the better trajectory relatively likelier; the worse one's likelihood falls behind."""
    method = opened("pso", steps=(3,), batch=16, clip=1.0)
    torch.manual_seed(4)
    labels = method.pair.labels(16)
    first, second = method._roll(labels, 16), method._roll(labels, 16)
    rolled = iter([first, second])
    monkeypatch.setattr(method, "_roll", lambda labels, count: next(rolled))
    monkeypatch.setattr(method.pair, "labels", lambda count: labels)
    rewards = iter([torch.ones(16), torch.zeros(16)])
    method._reward = lambda x: next(rewards)

    def likelihood():
        with torch.no_grad():
            return [sum(float(method._ratio(states, n, labels).log().mean()) for n in (0, 1)) for states in (first[0], second[0])]

    before = likelihood()
    assert max(map(abs, before)) < 1e-12  # the student is its reference at first
    loss = method.losses("student", None, clock(0))["preference"]
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-9)
    loss.backward()
    with torch.no_grad():
        for p in method.pair.student.network.parameters():
            p -= 1e-3 * p.grad
    better, worse = likelihood()
    assert better - worse > 1e-6
    assert untouched(method._reference.network)


def test_pso_rolls_the_sampler_and_clamps(monkeypatch):
    """States are the sampler's own; outside [1 - e, 1 + e] the ratio is cut, and with it the gradient."""
    method = opened("pso", random_denoiser("ddpm", "v"), steps=(3,), batch=4, clip=0.1)
    student, process = method.pair.student, method.pair.student.process
    assert torch.equal(method._times, Generator(student, SHAPE).times(3)[:-1])
    labels = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(3)
    states, made = method._roll(labels, 4)
    torch.manual_seed(3)
    x = process.scale(method._times[:1]) * torch.randn(4, *SHAPE)
    for n in range(3):
        assert torch.allclose(states[n], x)
        x = student.x0(x, method._times[n].expand(4), labels)
        if n < 2:
            x = process.diffuse(x, torch.randn(4, *SHAPE), method._times[n + 1].expand(4))
    assert torch.allclose(made, x) and len(states) == 3 and not made.requires_grad
    moved(method, 0.01)
    own = step_log_density(
        states[1],
        student.x0(states[0], method._times[0].expand(4), labels),
        *(f(method._times[1].expand(4)) for f in (process.alpha, process.sigma)),
    )
    before = step_log_density(
        states[1],
        method._reference.x0(states[0], method._times[0].expand(4), labels),
        *(f(method._times[1].expand(4)) for f in (process.alpha, process.sigma)),
    )
    assert torch.allclose(method._ratio(states, 0, labels), (own - before).exp().clamp(0.9, 1.1))
    method.clip = 1e-9
    ratio = method._ratio(states, 0, labels)
    assert bool(((ratio == 1 - 1e-9) | (ratio == 1 + 1e-9)).all())
    ratio.log().sum().backward()
    assert not grown(student.network)


def test_pso_refuses_and_denoises():
    with pytest.raises(UserError, match=r"one step"):
        opened("pso", steps=(1,))
    method = opened("pso", steps=(2,), objective="sft")
    terms = method.losses("student", None, clock(0))
    assert set(terms) == {"denoising"}
    terms["denoising"].backward()
    assert grown(method.pair.student.network)


def test_rewards():
    x = torch.randn(3, 1, 4, 4)
    assert torch.allclose(make_reward("ink", None)(x), x.mean((1, 2, 3)))
    assert make_reward("python:math:sqrt", None) is math.sqrt
    for name in ("inc", "python:", "python:no_such_module:f", "python:math:no_such", "python:math"):
        with pytest.raises(UserError):
            make_reward(name, None)


# ---- diversity distillation ----


def numbers(*values):
    return torch.tensor([float(v) for v in values])


def test_switch_examples():
    """The paper's examples: 20 and 50 leading DDIM steps, and a base so short that the rule alone would make no step."""
    ddpm = exact_denoiser(Mixture(torch.zeros(1, 1), 1.0), make_process("ddpm-scaled"), "noise")
    few = numbers(999, 759, 499, 259, -1)
    twenty, fifty, four = (numbers(*range(1000 - n, -1, -n), -1) for n in (50, 20, 250))
    assert switch(twenty, ddpm, few, ddpm, 1) == 4 and float(twenty[4]) == 750
    assert switch(fifty, ddpm, few, ddpm, 2) == 24
    assert switch(four, ddpm, few, ddpm, 1) == 1
    flow = exact_denoiser(Mixture(torch.zeros(1, 1), 1.0), make_process("flow"))
    times = flow.process.times(40)
    j = switch(times, flow, few, ddpm, 2)
    angle = ddpm.process.angle(few[2:3])
    gaps = (flow.process.angle(times) - angle).abs()
    assert 0 < j < 40 and float(gaps[j]) == float(gaps.min())
    for replaced in (0, 4):
        with pytest.raises(UserError, match=r"replaced"):
            switch(twenty, ddpm, few, ddpm, replaced)


@pytest.mark.parametrize("base,few", [("flow", "ddpm"), ("ddpm", "edm"), ("edm", "cosine")])
def test_hand_over_between_processes(base, few):
    """An exact Gaussian's state keeps its law from one process to the other: alpha mean, alpha^2 std^2 + sigma^2."""
    mean, std = 0.7, 0.5
    one, two = gaussian(mean, std, base, "x0"), gaussian(mean, std, few, "v")
    seen = []
    network = two.network.forward
    two.network.forward = lambda x, level, label=None: seen.append((x, level)) or network(x, level, label)
    options = {"base_steps": 300, "replaced": 1}
    times = two.process.times(3)
    made = hybrid_sample(one, two, torch.randn(4000, *SHAPE), None, times, "renoise", None, options)
    state, level = seen[0]
    a, s = float(two.process.alpha(level[:1])), float(two.process.sigma(level[:1]))
    wanted = (a * a * std * std + s * s) ** 0.5
    assert abs(float(state.mean()) - a * mean) < 0.03 * wanted and abs(float(state.std()) / wanted - 1) < 0.03
    assert abs(float(two.process.angle(level[:1]) - two.process.angle(times[1:2]))) < 0.02
    assert len(seen) == 2 and float(seen[1][1][0]) == float(times[2])
    assert abs(float(made.mean()) - mean) < 0.05


def test_hybrid_times_fall():
    """A coarse base may land beyond several of the few steps; those are left out, so that noise never rises again."""
    model, heard = gaussian(0.0, 1.0), []
    few = gaussian(0.0, 1.0)
    few.network.register_forward_pre_hook(lambda module, args: heard.append(float(args[1][0])))
    hybrid_sample(model, few, torch.randn(3, *SHAPE), None, few.process.times(8), "renoise", None, {"base_steps": 2, "replaced": 1})
    assert heard == [0.5, 0.375, 0.25, 0.125]


def test_diversity_distillation():
    """Calls count both models, guided ones twice; the base has the teacher's guidance; nothing is trained."""
    teacher = random_denoiser().guided(3.0)
    method = opened("diversity-distillation", teacher, steps=(4,), base_steps=20)
    generator = method.finish(method.pair.student)
    assert not method.trains and generator.base is teacher and generator.base.guidance.scale == 3.0
    assert generator.calls(4) == 2 * 5 + 3  # down to 0.75 by twentieths, then at 0.75, 0.5 and 0.25
    assert 0 < method.figures(generator)["diversity_at_first"] < math.inf
    for steps, replaced in (((1,), 1), ((4, 2), 2)):
        with pytest.raises(UserError, match=r"replaces"):
            opened("diversity-distillation", teacher, steps=steps, replaced=replaced)


# ---- critics ----


def test_heads():
    """Tokens of vectors, pictures and sequences; the class term is a scaled projection; the null label has its own row."""
    heads = Heads([5, 3, 4], classes=3, hidden=16)
    features = [torch.randn(2, 5), torch.randn(2, 3, 2, 2), torch.randn(2, 7, 4)]
    assert heads(features).shape == (2, 1 + 4 + 7)
    labels = torch.tensor([1, 3])
    said = heads(features, labels) - heads(features)
    hidden = heads.bodies[1](features[1].flatten(2).transpose(1, 2))
    expected = (hidden * heads.classes[1](labels)[:, None]).sum(-1) / 4
    assert torch.allclose(said[:, 1:5], expected)
    assert Heads([5]).classes is None and Heads([5])([features[0]], labels).shape == (2, 1)
    assert "parametrizations" in dict(Heads([5], spectral=True).bodies[0].named_modules())["0"].__dict__["_modules"]
    method = opened("dmd2", gan=0.1)
    assert middle_of(method.fake) == ("blocks.0",) and widths_of(method.fake, method.pair) == [8, 8]


def test_random_embeddings():
    """Fresh frozen weights from the global generator at every draw, of both kinds; earlier draws keep theirs."""
    made = RandomEmbeddings((1, 8, 8), torch.device("cpu"), dim=5)
    torch.manual_seed(0)
    nets = [made.draw() for _ in range(12)]
    kept = [next(n.parameters()).clone() for n in nets]
    torch.manual_seed(0)
    again = [made.draw() for _ in range(12)]
    assert len({type(n) for n in nets}) == 2
    for net, other, first in zip(nets, again, kept):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
        assert torch.equal(next(net.parameters()), first) and not any(p.requires_grad for p in net.parameters())
        assert net(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    assert not any(torch.equal(a, b) for n, a in enumerate(kept) for b in kept[:n] if a.shape == b.shape)


# ---- the program ----


def test_the_collapse_alarm():
    """It rises below a tenth of the pictures' spread, keeps silent above and for tiny batches, and draws nothing that others would."""
    torch.set_default_dtype(torch.float32)
    pictures = Pictures(open_data("digits"))
    net = build("denoising-mlp", input_shape=(1, 8, 8), classes=10, width=8, depth=1)
    teacher = Denoiser(net, make_process("flow"), classes=10)
    student = teacher.with_network(copy.deepcopy(net))
    spec, training = schema.Generate(), schema.Training(batch=8)
    pair = Pair(teacher, student, pictures, spec, training, 10, torch.device("cpu"))
    program = SamplingProgram(registry.make("dmd2", {"gan": 0.0}), pair)
    assert program.vitals() == []
    real = pictures.random(64)[0]
    middle = real.mean(0)
    state = torch.random.get_rng_state()
    for share, alarm in ((1.0, False), (0.2, False), (0.05, True), (0.0, True)):
        program.method.made = middle + share * (real - middle)
        found = program.vitals()
        assert bool(found) == alarm and (not alarm or found[0].startswith("collapse")), share
    program.method.made = middle.expand(5, -1, -1, -1)
    assert program.vitals() == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(program.optimizers()) == {"student", "fake"} and program.turns(clock(1)) == ("fake",)
