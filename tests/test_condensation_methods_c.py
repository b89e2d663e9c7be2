"""Methods that recover images from trained networks, and KRR-ST, against calculations by hand."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import recipe as schema
from limbeck import zoo
from limbeck.condensation import job
from limbeck.condensation.methods import sre2l
from limbeck.condensation.methods.cda import CDA
from limbeck.condensation.methods.cv_dd import CVDD
from limbeck.condensation.methods.infer import INFER
from limbeck.condensation.methods.krr_st import KRRST
from limbeck.condensation.methods.sre2l import SRe2L
from limbeck.condensation.problem import Problem
from limbeck.condensation.students import lesson_loss, lessons
from limbeck.data import open_data
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.storage import tensors_fingerprint

torch.set_num_threads(1)
CLOCK = Clock(0, 10, 10)
STILL = {"crop": False, "jitter": 0}
"""Nothing random between an image and the network that looks at it."""


def problem_of(per_class=2, teachers="", norm="batch", inner_norm="instance"):
    """Digits, and teachers that saw a few batches, so that their running statistics are no longer 0 and 1."""
    data = open_data("digits", train=300, valid=60)
    inner = schema.Model(model="convnet", args={"width": 4, "depth": 2, "norm": inner_norm})
    own = Problem(data, schema.Condense(per_class=per_class), inner, Session())
    for number, name in enumerate(teachers):
        torch.manual_seed(number)
        network = zoo.build("convnet", input_shape=(1, 8, 8), classes=10, width=4 + number, depth=2, norm=norm)
        if norm == "batch":
            for index in torch.arange(300).split(50):
                network(own.at(index))
        own.teachers[name] = network.eval().requires_grad_(False)
    return own


def distance(network, x, first=10.0):
    """Sum over BatchNorm layers of the distances of mean and biased variance from the running ones, by walking through the network."""
    total, number = 0.0, 0
    for module in [*network.stages.modules()]:
        if list(module.children()):
            continue
        if isinstance(module, nn.BatchNorm2d):
            flat = x.transpose(0, 1).flatten(1)
            mean, variance = flat.mean(1), (flat - flat.mean(1, keepdim=True)).square().mean(1)
            gap = (variance - module.running_var).pow(2).sum().sqrt() + (mean - module.running_mean).pow(2).sum().sqrt()
            total, number = total + gap * (first if number == 0 else 1.0), number + 1
        x = module(x)
    assert number == 2
    return total


def surprise(network, x, labels):
    logits = network(x)
    return -(logits - logits.logsumexp(1, keepdim=True))[range(len(x)), labels].mean()


# ---- SRe2L ----


def test_recovery_against_a_walk_through_the_network():
    """Batches hold the g-th image of every class; terms of different images of a class are added up."""
    own = problem_of(per_class=2, teachers="ab")
    made = own.initial("noise")
    method = SRe2L(member="b", statistics=0.3, first=7.0, variation=0.02, energy=0.05, **STILL)
    method.prepare(own)
    found = method.losses("set", made, own, CLOCK)
    hard = matched = smooth = 0.0
    for g in (0, 1):
        x = torch.stack([made.images[2 * c + g] for c in range(10)])
        hard = hard + surprise(own.teachers["b"], x, list(range(10)))
        matched = matched + distance(own.teachers["b"], x, 7.0)
        across, down = x[..., 1:] - x[..., :-1], x[:, :, 1:] - x[:, :, :-1]
        edges = [across, down, x[:, :, 1:, 1:] - x[:, :, :-1, :-1], x[:, :, 1:, :-1] - x[:, :, :-1, 1:]]
        smooth = smooth + 0.02 * sum(e.square().sum().sqrt() for e in edges) + 0.05 * x.flatten(1).square().sum(1).sqrt().mean()
    assert float(found["hard"].detach()) == pytest.approx(float(hard.detach()), rel=1e-5)
    assert float(found["statistics"].detach()) == pytest.approx(0.3 * float(matched.detach()), rel=1e-5)
    assert float(found["smooth"].detach()) == pytest.approx(float(smooth.detach()), rel=1e-5)
    ours = torch.autograd.grad(sum(found.values()), made.images)[0]
    theirs = torch.autograd.grad(hard + 0.3 * matched + smooth, made.images)[0]
    assert torch.allclose(ours, theirs, atol=1e-6) and float(ours.abs().sum()) > 0


def test_the_gradient_of_the_recovery_by_finite_differences():
    own = problem_of(per_class=1, teachers="a")
    own.teachers["a"].double()
    method = SRe2L(statistics=0.5, **STILL)
    method.prepare(own)
    made = SimpleNamespace(images=own.initial("real").images.detach().double().requires_grad_(True))
    value = lambda: sum(method.losses("set", made, own, CLOCK).values())  # noqa: E731
    gradient = torch.autograd.grad(value(), made.images)[0].flatten()
    for position in (3, 100, 325, 600):
        ends = []
        for change in (1e-6, -1e-6):
            with torch.no_grad():
                made.images.view(-1)[position] += change
                ends.append(float(value()))
                made.images.view(-1)[position] -= change
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient[position]), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_recovered_images_please_the_network_and_stay_pixels(weight):
    """Without statistics they are classified more surely than noise; with them their statistics come near to the stored ones."""
    own = problem_of(per_class=2, teachers="a")
    network = own.teachers["a"].train().requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(own.all()[0]), own.all()[1]).backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    method = SRe2L(iterations=100, lr_images=0.1, statistics=weight, label_epochs=2, **STILL)
    made = job.condense(method, own, None)
    low, high = own.pixel_bounds()

    def costs(images):
        return [float(f) for f in (surprise(network, images, list(range(10))), distance(network, images))]

    for g in (0, 1):
        before, after = costs(own.initial("noise").images[g::2].detach()), costs(made.images[g::2].detach())
        assert after[1] < 0.5 * before[1] if weight else after[0] < 0.5 * before[0]
    slack = float(high.max() - low.min()) / 255
    assert float(made.images.detach().min()) >= float(low.min()) - slack and float(made.images.detach().max()) <= float(high.max()) + slack
    wild = own.initial("noise")
    with torch.no_grad():
        wild.images.mul_(100)
    method.after_step(wild, own, CLOCK)
    assert float(wild.images.detach().min()) == float(low) and float(wild.images.detach().max()) == float(high)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_what_the_optimiser_is():
    own = problem_of(teachers="a")
    made = own.initial("noise")
    optimizer = SRe2L(lr_images=0.2).optimizers(made)["set"]
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["betas"] == (0.5, 0.9) and SRe2L.schedule == "cosine"
    assert [p is made.images for p in optimizer.param_groups[0]["params"]] == [True] and optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "none"])
def test_stored_labels_are_what_the_network_says_of_each_view(mix, tmp_path):
    """Views are made again here from the images alone; students get exactly them, and the file counts two bytes for a logit."""
    own = problem_of(per_class=3, teachers="ab")
    method = SRe2L(iterations=0, init="real", member="b", label_epochs=4, mix=mix, alpha=0.7, temperature=5.0)
    made = job.condense(method, own, None)
    assert made.view_logits.dtype == torch.float16 and made.view_logits.shape == (4, 30, 10)
    assert made.bytes()["soft labels"] == 4 * 30 * 10 * 2
    assert made.how["loss"] == "kl" and made.how["temperature"] == 5.0
    made.save(tmp_path)
    replay = lessons(type(made).load(tmp_path), 30)
    seen = []
    for epoch in range(5):
        (lesson,) = replay.epoch(epoch, 0)
        assert torch.allclose(lesson.y, own.teachers["b"](lesson.x), atol=0.02)
        seen.append(lesson.x)
    assert torch.equal(seen[0], seen[4]) and not torch.allclose(seen[0], seen[1])
    originals = made.decode()[0].detach().flatten(1)
    nearest = torch.cdist(seen[0].flatten(1), originals).min(1).values
    assert (float(nearest.max()) < 0.05) == (mix == "none")


def test_others_get_labels_of_the_same_views():
    own = problem_of(per_class=2, teachers="a")
    method = SRe2L(iterations=2, label_epochs=3, jitter=0)
    made = job.condense(method, own, None)
    other = method.soften(own.initial("real"), own)
    assert other.views == made.views and other.how == made.how and other.bytes() == made.bytes()
    x, order = other.view(2)
    assert torch.equal(order, made.view(2)[1]) and torch.allclose(own.teachers["a"](x), other.view_logits[2].float(), atol=0.02)


def test_the_students_loss_has_no_squared_temperature():
    z, s = torch.randn(5, 10), torch.randn(5, 10)
    p = torch.softmax(z / 20, 1)
    expected = F.kl_div(torch.log_softmax(s / 20, 1), p, reduction="batchmean")
    assert float(lesson_loss(s, z, "kl", 20.0)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("cls", [SRe2L, CDA, CVDD, INFER])
def test_networks_that_cannot_be_inverted_are_named(cls):
    with pytest.raises(UserError, match=r"teacher a .*no BatchNorm"):
        cls().prepare(problem_of(teachers="ab", norm="instance"))


@pytest.mark.parametrize("cls", [SRe2L, CDA, CVDD])
def test_an_unknown_member_is_named(cls):
    with pytest.raises(UserError, match="teacher"):
        cls(member="z").prepare(problem_of(teachers="ab"))


# ---- CDA ----


def test_the_curriculum_reaches_the_crop(monkeypatch):
    own = problem_of(per_class=1, teachers="a")
    asked = []
    monkeypatch.setattr(sre2l, "random_resized_crop", lambda x, least: asked.append(least) or x)
    for method in (CDA(min_scale=0.3), CDA(min_scale=0.3, curve="linear", milestone=0.5), SRe2L(min_scale=0.3)):
        method.prepare(own)
        for step in (0, 25, 50, 99):
            method.losses("set", own.initial("noise"), own, Clock(step, 100, 100))
    cosine, linear, constant = asked[:4], asked[4:8], asked[8:]
    assert cosine == pytest.approx([1.0, 0.3 + 0.35 * (1 + math.cos(math.pi / 4)), 0.65, 0.3 + 0.35 * (1 + math.cos(0.99 * math.pi))])
    assert linear == pytest.approx([1.0, 0.65, 0.3, 0.3]) and constant == [0.3] * 4


def test_one_box_and_one_roll_for_a_batch(monkeypatch):
    """Equal images stay equal: statistics over a batch of classes would mean something else if each had its own part."""
    method = SRe2L(min_scale=0.2, jitter=3)
    torch.manual_seed(0)
    one = torch.randn(1, 1, 8, 8)
    looks = [method.seen(one.repeat(4, 1, 1, 1), CLOCK) for _ in range(6)]
    assert all(torch.equal(look, look[:1].expand_as(look)) for look in looks) and not torch.equal(looks[0], looks[1])


# ---- CV-DD ----


def votes(priors, names, temperature):
    raised = np.exp([priors[name] / temperature for name in names])
    return raised / raised.sum()


def test_committees_against_a_sum_by_hand():
    priors = {"a": 60.0, "b": 66.0, "c": 57.0}
    own = problem_of(per_class=6, teachers="abc")
    made = own.initial("noise")
    method = CVDD(priors=priors, selected=2, statistics=0.2, **STILL)
    method.prepare(own)
    found = method.losses("set", made, own, CLOCK)
    names = {id(reader): name for name, reader in method._readers.items()}
    hard = matched = 0.0
    pairs = set()
    for g in range(6):
        chosen = [names[id(reader)] for reader, _ in method.committee(g, own)]
        assert len(set(chosen)) == 2
        pairs.add(frozenset(chosen))
        x = made.images.unflatten(0, (10, 6))[:, g]
        for name, weight in zip(chosen, votes(priors, chosen, 5.0)):
            hard = hard + weight * surprise(own.teachers[name], x, list(range(10)))
            matched = matched + weight * distance(own.teachers[name], x)
    assert float(found["hard"].detach()) == pytest.approx(float(hard.detach()), rel=1e-5)
    assert float(found["statistics"].detach()) == pytest.approx(0.2 * float(matched.detach()), rel=1e-5)
    assert len(pairs) > 1


def normalised_by_the_batch(network, x):
    """Logits with the batch's own statistics, without training mode."""
    for module in network.stages.modules():
        if list(module.children()):
            continue
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            scaled = (x - mean) / (variance + module.eps).sqrt()
            x = scaled * module.weight.view(-1, 1, 1) + module.bias.view(-1, 1, 1)
        else:
            x = module(x)
    return network.head(network.pool(x))


@pytest.mark.parametrize("priors", [{}, {"a": 60.0, "b": 72.0}])
def test_labels_with_statistics_of_halves(priors):
    own = problem_of(per_class=2, teachers="ab")
    method = CVDD(priors=priors, label_epochs=2, iterations=1, **STILL)
    method.prepare(own)
    before = {name: tensors_fingerprint(network.state_dict()) for name, network in own.teachers.items()}
    x = own.at(torch.arange(20))
    found = method.labels(x, own)
    weights = votes(priors, "ab", 10.0) if priors else [0.5, 0.5]
    expected = sum(
        float(weight) * torch.cat([normalised_by_the_batch(own.teachers[name], half) for half in (x[:10], x[10:])])
        for name, weight in zip("ab", weights)
    )
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(found, method.labels(x, own))
    running = [module.running_mean for module in method._live["a"].modules() if isinstance(module, nn.BatchNorm2d)]
    stored = [module.running_mean for module in own.teachers["a"].modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(a, b) for a, b in zip(running, stored))
    assert {name: tensors_fingerprint(network.state_dict()) for name, network in own.teachers.items()} == before
    assert not any(network.training for network in own.teachers.values())
    plain = CVDD(priors=priors, batch_statistics=False)
    plain.prepare(own)
    stored = sum(float(weight) * own.teachers[name](x) for name, weight in zip("ab", weights))
    assert torch.allclose(plain.labels(x, own), stored, atol=1e-5) and not torch.allclose(stored, found, atol=1e-2)


def test_committees_that_cannot_be():
    own = problem_of(teachers="ab")
    with pytest.raises(UserError, match="selects 3 members of 2"):
        CVDD(selected=3).prepare(own)
    method = CVDD(priors={"a": 60.0})
    method.prepare(own)
    with pytest.raises(UserError, match="teacher b"):
        method.committee(0, own)
    alone = CVDD(member="b")
    alone.prepare(own)
    ((reader, weight),) = alone.committee(0, own)
    assert reader.network is own.teachers["b"] and weight == 1.0


# ---- INFER ----


def test_patterns_against_a_sum_by_hand():
    own = problem_of(per_class=3, teachers="ab")
    method = INFER(statistics=0.4, **STILL)
    method.prepare(own)
    made = method.begin(own)
    real = int(3 / (2 / 10 + 1))
    assert real == 2 and made.patterns.shape[0] == 4 and float(made.patterns.detach().abs().sum()) == 0
    with torch.no_grad():
        made.patterns.normal_(std=0.3)
    found = method.losses("set", made, own, CLOCK)
    expected = 0.0
    for k in range(2):
        for m, name in enumerate("ab"):
            x = torch.stack([made.images[2 * c + k].detach() for c in range(10)]) + made.patterns[2 * k + m]
            expected = expected + surprise(own.teachers[name], x, list(range(10))) + 0.4 * distance(own.teachers[name], x)
    assert float(sum(found.values()).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    ours = torch.autograd.grad(sum(found.values()), [made.patterns, made.images], allow_unused=True)
    assert torch.allclose(ours[0], torch.autograd.grad(expected, made.patterns)[0], atol=1e-6) and ours[1] is None


def test_training_samples_are_real_ones_with_and_without_patterns():
    own = problem_of(per_class=3, teachers="ab")
    seed_everything(0)
    made = job.condense(INFER(iterations=4, jitter=1), own, None)
    x, y = made.decode()
    assert torch.equal(y, torch.arange(10).repeat_interleave(2 * 3)) and float(made.patterns.detach().abs().min(0).values.max()) > 0
    raw = own.initial("real", 2).images.detach()
    step = float(raw.max() - raw.min()) / 255
    by_class = x.detach().unflatten(0, (10, 2, 3))
    assert float((by_class[:, :, 0] - raw.unflatten(0, (10, 2))).abs().max()) <= step
    for k in range(2):
        for m in range(2):
            added = by_class[:, k, 1 + m] - by_class[:, k, 0]
            assert torch.allclose(added, added[:1].expand_as(added), atol=1e-5)
            assert torch.allclose(added[0], made.patterns[2 * k + m], atol=1e-5)


@pytest.mark.parametrize("patterns", [True, False])
def test_static_labels_are_the_mean_of_the_networks(patterns):
    own = problem_of(per_class=3, teachers="ab")
    made = job.condense(INFER(iterations=3, jitter=0, patterns=patterns, temperature=7.0), own, None)
    x = made.decode()[0].detach()
    assert torch.allclose(made.logits, (own.teachers["a"](x) + own.teachers["b"](x)) / 2, atol=1e-4) and made.view_logits is None
    assert made.how == {"loss": "kl", "temperature": 7.0, "mix": "mixup", "alpha": 0.8}
    assert len(made) == (60 if patterns else 30) and made.bytes()["soft labels"] == len(made) * 10 * 2
    assert made.bytes()["images"] <= 3 * 10 * 64  # the budget: three images a class
    other = INFER(temperature=7.0).soften(own.initial("real"), own)
    x = other.decode()[0].detach()
    assert torch.allclose(other.logits, (own.teachers["a"](x) + own.teachers["b"](x)) / 2, atol=1e-4) and other.how == made.how


def test_dynamic_labels_are_stored_for_every_view():
    own = problem_of(per_class=3, teachers="ab")
    made = job.condense(INFER(iterations=3, jitter=0, dynamic=True, label_epochs=2), own, None)
    assert made.logits is None and made.view_logits.shape == (2, 60, 10)
    x, _ = made.view(1)
    assert torch.allclose(made.view_logits[1].float(), (own.teachers["a"](x) + own.teachers["b"](x)) / 2, atol=0.02)


# ---- KRR-ST ----

QUICK = {"iterations": 3, "pool": 2, "online_steps": 4, "batch_real": 32, "teacher_epochs": 1, "lr_set": 0.01, "probe_steps": 5}


def krr(own, **changes):
    """A prepared method and the set with which it begins, without changes of the real batch."""
    method = KRRST(**{**QUICK, **changes})
    seed_everything(0)
    method.prepare(own)
    method._augment = None
    return method, method.begin(own)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_outer_loss_against_normal_equations(norm):
    """Ridge regression in feature space (primal) instead of the kernel's (dual), on the batch and network that were drawn."""
    own = problem_of(per_class=2, inner_norm=norm)
    method, made = krr(own)
    torch.manual_seed(4)
    found = method.losses("set", made, own, CLOCK)["regression"]
    torch.manual_seed(4)
    net = method._nets[int(torch.randint(2, ()))]
    x = own.at(method._source[torch.randint(len(method._source), (32,))])
    network = copy.deepcopy(net.network).eval()
    g = lambda v: torch.cat([network.pool(network.stages(network.stem(v))), torch.ones(len(v), 1)], 1).double()  # noqa: E731
    own_features, theirs = g(made.images), g(x).detach()
    table = own_features.T @ own_features
    strength = 1e-6 * float(table.diagonal().sum().detach())
    weights = torch.linalg.solve(table + strength * torch.eye(len(table)).double(), own_features.T @ made.targets.double())
    expected = ((theirs @ weights - method._target(x).double()) ** 2).mean()
    assert net is method._net and float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    ours = torch.autograd.grad(found, [made.images, made.targets], retain_graph=True)
    for mine, other in zip(ours, torch.autograd.grad(expected, [made.images, made.targets])):
        assert F.cosine_similarity(mine.flatten(), other.flatten(), 0) > 0.999 and float(mine.abs().sum()) > 0
    found.backward()
    method.after_step(made, own, CLOCK)  # nothing of the outer loss stays behind for the network's own next step
    assert all(p.grad is None or not p.grad.any() for p in net.network.parameters())


def test_targets_begin_as_the_centred_features_of_the_network():
    own = problem_of(per_class=2)
    method, made = krr(own)
    assert torch.equal(made.targets, method._target(made.images.detach()))
    everything = method._target(own.at(method._source))
    assert float(everything.mean(0).abs().max()) < 1e-4 and float(everything.std(0).min()) > 0
    one = method._target(made.images[:1].detach())  # in evaluation mode, so that no other sample of the batch counts
    assert torch.allclose(one, made.targets[:1], atol=1e-5) and not everything.requires_grad


def test_the_drawn_network_makes_one_plain_step():
    own = problem_of(per_class=2)
    method, made = krr(own, pool=1, online_steps=50, online_lr=0.05, online_momentum=0.8, online_decay=0.01)
    net = method._net = method._nets[0]
    copied = copy.deepcopy(net.network).train()
    optimizer = torch.optim.SGD(copied.parameters(), 0.05, 0.8, weight_decay=0.01)
    for mine, other in zip(net.network.parameters(), copied.parameters()):
        optimizer.state[other]["momentum_buffer"] = net._optimizer.state[mine]["momentum_buffer"].clone()
    ((copied(made.images.detach()) - made.targets.detach()) ** 2).mean().backward()
    optimizer.step()
    before, images = net.steps, made.images.detach().clone()
    method.after_step(made, own, CLOCK)
    assert net.steps == before + 1 and torch.equal(images, made.images) and made.images.grad is None and made.targets.grad is None
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(net.network.parameters(), copied.parameters()))


def test_a_network_that_is_old_begins_again():
    """With other weights, no momentum, and a count from zero: it then lives as long as any other."""
    own = problem_of(per_class=2)
    method, made = krr(own, pool=1, online_steps=6)
    net = method._net = method._nets[0]
    assert 1 <= net.steps < 6
    while net.steps < 5:
        method.after_step(made, own, CLOCK)
    old = [p.detach().clone() for p in net.network.parameters()]
    method.after_step(made, own, CLOCK)
    assert net.steps == 0 and not net.memory()["momentum"] and not torch.equal(old[0], next(net.network.parameters()))
    method.after_step(made, own, CLOCK)
    assert net.steps == 1
    old = [p.detach().clone() for p in net.network.parameters() if p.ndim > 1]
    net.renew()
    assert not any(torch.equal(a, b) for a, b in zip(old, [p for p in net.network.parameters() if p.ndim > 1]))


def test_the_pools_networks_are_of_all_ages_and_come_back():
    own = problem_of(per_class=2)
    method, made = krr(own, pool=6, online_steps=40)
    ages = [net.steps for net in method._nets]
    assert len(set(ages)) > 3 and min(ages) >= 1 and max(ages) < 40
    kept, weights = copy.deepcopy(method.memory()), {k: copy.deepcopy(m.state_dict()) for k, m in method.modules().items()}

    def go_on():
        torch.manual_seed(3)
        for _ in range(5):
            method.losses("set", made, own, CLOCK)
            method.after_step(made, own, CLOCK)
        return [p.detach().clone() for net in method._nets for p in net.network.parameters()]

    first = go_on()
    method.restore(kept)
    for name, module in method.modules().items():
        module.load_state_dict(weights[name])
    assert [net.steps for net in method._nets] == ages
    assert all(torch.equal(a, b) for a, b in zip(first, go_on()))


def test_only_the_source_is_looked_at_and_others_are_probed(monkeypatch):
    own = problem_of(per_class=2)
    allowed = set(torch.cat([own.of_class(c) for c in (0, 3, 4)]).tolist())
    at = own.at

    def watched(index):
        assert set(index.tolist()) <= allowed
        return at(index)

    monkeypatch.setattr(own, "at", watched)
    made = job.condense(KRRST(source_classes=(0, 3, 4), **QUICK), own, None)
    assert made.how["loss"] == "mse" and made.how["probe_classes"] == [1, 2, 5, 6, 7, 8, 9]
    assert len(made.images) == len(made.targets) == 20 and "labels" not in made.bytes()


def test_labels_play_no_part():
    """Other classes for the same samples: the same bits."""
    first = problem_of(per_class=2)
    second = problem_of(per_class=2)
    torch.manual_seed(0)
    data = copy.deepcopy(second.data)
    data.train.labels.copy_(data.train.labels[torch.randperm(300)])
    second = Problem(data, second.condense, second._inner, Session())
    assert not torch.equal(first.of_class(0), second.of_class(0))
    a, b = (job.condense(KRRST(**QUICK), own, None) for own in (first, second))
    assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)


def test_outer_steps_lower_the_loss():
    own = problem_of(per_class=2)
    method, made = krr(own, pool=2, online_steps=60, batch_real=128)
    optimizer = method.optimizers(made)["set"]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(made.images), id(made.targets)}
    assert type(optimizer) is torch.optim.AdamW and KRRST.schedule == "linear"

    def value():
        torch.manual_seed(9)
        return np.mean([float(method.losses("set", made, own, CLOCK)["regression"]) for _ in range(8)])

    before = value()
    torch.manual_seed(1)
    for _ in range(60):
        optimizer.zero_grad()
        method.losses("set", made, own, CLOCK)["regression"].backward()
        optimizer.step()
        method.after_step(made, own, CLOCK)
    assert value() < 0.75 * before


def test_the_figure_is_of_the_source_and_repeatable():
    own = problem_of(per_class=2)
    method, made = krr(own)
    first = method.figures(made, own)
    torch.manual_seed(77)
    assert method.figures(made, own) == first and 0 < first["feature_mse"] < 3
    with torch.no_grad():
        made.targets.zero_()
    spread = float(method._target(own.at(method._source)).square().mean())
    assert method.figures(made, own)["feature_mse"] == pytest.approx(spread, rel=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"source_classes": (3, 12)}, "no class number 12"), ({"source_classes": (3,), "per_class": 9}, "fewer than the 90")],
)
def test_sources_that_cannot_be(changes, message):
    own = problem_of(per_class=changes.pop("per_class", 2))
    with pytest.raises(UserError, match=message):
        KRRST(**{**QUICK, **changes}).prepare(own)
