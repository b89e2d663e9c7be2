"""Matching methods against independent formulas, and what they do along the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import recipe as schema
from limbeck.condensation import job
from limbeck.condensation.matching import sides
from limbeck.condensation.methods.datadam import DataDAM
from limbeck.condensation.methods.distribution_matching import DistributionMatching
from limbeck.condensation.methods.fyi import FYI
from limbeck.condensation.methods.gradient_matching import GradientMatching
from limbeck.condensation.methods.ncfm import NCFM
from limbeck.condensation.problem import Problem
from limbeck.data import open_data
from limbeck.engine.callbacks import Callback
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Interrupted
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError

torch.set_num_threads(1)
CLOCK = Clock(0, 10, 10)


def problem_of(per_class=2, session=None, depth=2, **condense):
    data = open_data("digits", train=300, valid=60)
    inner = schema.Model(model="convnet", args={"width": 4, "depth": depth})
    return Problem(data, schema.Condense(per_class=per_class, **condense), inner, session or Session())


def fixed(problem, monkeypatch):
    """The one network that the problem gives from now on, and all real samples of a class whenever some are asked for."""
    network = problem.network()
    monkeypatch.setattr(problem, "network", lambda reuse=None, outputs=None: network)
    monkeypatch.setattr(problem, "real", lambda c, n: problem.at(problem.of_class(c)))
    return network


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_datadam_against_hooks(monkeypatch, power):
    """Attention of every ReLU but the last, before pooling, and the last features; class by class."""
    own = problem_of(depth=3)
    made, network = own.initial("noise"), fixed(own, monkeypatch)
    method = DataDAM(balance=0.3, layer_weight=7.0, power=power)
    found = method.losses("set", made, own, CLOCK)
    seen = []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, out: seen.append(out.clone()))

    def statistics(x):
        seen.clear()
        embedding = network.pool(network.stages(x))
        maps = []
        for out in seen:
            total = (out.abs() ** power).sum(1).flatten(1)
            maps.append((total / total.pow(2).sum(1, keepdim=True).sqrt()).mean(0))
        return maps, embedding.mean(0)

    attention, means = 0.0, 0.0
    for c in range(10):
        (own_maps, own_mean), (maps, mean) = statistics(made.of_class(c)), statistics(own.at(own.of_class(c)))
        assert len(maps) == 3
        attention += sum(float(((a - b).detach() ** 2).sum()) for a, b in zip(own_maps[:-1], maps[:-1]))
        means += float(((own_mean - mean).detach() ** 2).sum())
    assert float(found["attention"]) == pytest.approx(7 * attention, rel=1e-4)
    assert float(found["means"]) == pytest.approx(7 * 0.3 * means, rel=1e-4)
    with pytest.raises(UserError, match="1 ReLU"):
        DataDAM().losses("set", made, problem_of(depth=1), CLOCK)


def test_ncfm_against_complex_numbers(monkeypatch):
    """300 times the mean over frequencies, of rows of length 1, for the class whose turn it is."""
    own = problem_of(per_class=3)
    made, network = own.initial("noise"), fixed(own, monkeypatch)
    method = NCFM(frequencies=32, models=0, amplitude=0.2, phase=0.7)
    method.prepare(own)
    torch.manual_seed(4)
    found = float(method.losses("set", made, own, Clock(13, 30, 30))["characteristic"].detach())
    features = [F.normalize(network.pool(network.stages(x)).detach(), dim=1) for x in (made.of_class(3), own.at(own.of_class(3)))]
    torch.manual_seed(4)
    t = torch.randn(32, features[0].shape[1])
    s, r = (torch.exp(1j * (x @ t.T)).mean(0) for x in features)
    content = 0.2 * (r.abs() - s.abs()) ** 2 + 0.7 * 2 * (r.abs() * s.abs() - (r * s.conj()).real)
    assert found == pytest.approx(300 * float(content.sqrt().mean()), rel=1e-3)


def test_ncfm_networks_lie_between_first_and_last_weights():
    own = problem_of()
    method = NCFM(frequencies=16, models=2, model_epochs=1, batch_real=8)
    method.prepare(own)
    made = own.initial("real")
    for seed in range(4):
        torch.manual_seed(seed)
        method.losses("set", made, own, Clock(0, 10, 10))
        number, share = method._between
        first, last = method._pairs[number]
        assert not torch.equal(first, last) and 0 <= share <= 1
        assert torch.allclose(method._functional.flatten(method._network), last + share * (first - last), atol=1e-6)
    before = method._functional.flatten(method._network)
    method.losses("set", made, own, Clock(1, 10, 10))
    assert torch.equal(before, method._functional.flatten(method._network))  # one network a round
    calibration = method.losses("calibration", made, own, Clock(1, 10, 10))["calibration"]
    trained = copy.deepcopy(method._network)
    torch.nn.utils.vector_to_parameters(method._pairs[method._between[0]][1], trained.parameters())
    expected = F.cross_entropy(trained(made.of_class(1)), torch.ones(2, dtype=torch.long))
    assert float(calibration.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_canvases_begin_as_reduced_real_samples():
    own = problem_of(per_class=1)
    made = NCFM(factor=2).begin(own)
    parts = own.initial("real", 4).images.detach()
    assert len(made) == 40 and made.images.shape == (10, 1, 8, 8)
    assert torch.allclose(made.images[3, :, :4, 4:], F.avg_pool2d(parts[13], 2), atol=1e-6)
    assert torch.allclose(made.images[3, :, 4:, :4], F.avg_pool2d(parts[14], 2), atol=1e-6)


SETTINGS = {
    "distribution-matching": {"batch_real": 16},
    "datadam": {"batch_real": 16},
    "gradient-matching": {"batch_real": 8, "outer_loop": 3, "inner_loop": 2, "batch_inner": 8},
    "ncfm": {"batch_real": 16, "frequencies": 16, "models": 2, "model_epochs": 1, "minmax": True},
    "fyi": {"base": "gradient-matching", "base_settings": {"batch_real": 8, "outer_loop": 3, "inner_loop": 2}},
}


@pytest.mark.parametrize("id", list(SETTINGS))
def test_resume_with_augmentation_and_all_turns(id, tmp_path):
    """Stopped within a round, with trained networks, calibration, learnt frequencies and siamese draws: the same bits."""

    class Stop(Callback):
        phase = ""

        def start(self, phase, step, total):
            self.phase = phase

        def log(self, record):
            if self.phase == job.PHASE and record.get("step", 0) >= 5:
                raise KeyboardInterrupt

    def run(folder, callbacks=()):
        session = Session(folder=folder, checkpoints=schema.Checkpoints(every_steps=1), digest="a", callbacks=callbacks)
        own = problem_of(session=session, siamese="color_crop_cutout_scale_rotate")
        seed_everything(0)
        return job.condense(job.make_method(schema.resolve({**RECIPE, "method": {"id": id, **SETTINGS[id]}}).method), own, 12).images

    whole = run(tmp_path / "whole")
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        run(tmp_path / "cut", [Stop()])
    assert torch.equal(whole, run(tmp_path / "cut"))


RECIPE = {"name": "a", "student": "convnet", "data": {"source": "digits"}}


@pytest.mark.parametrize(
    "method",
    [
        DistributionMatching(batch_real=10**6),
        DataDAM(batch_real=10**6),
        GradientMatching(batch_real=10**6, outer_loop=1, inner_loop=1, lr_images=1.0),
        NCFM(batch_real=10**6, frequencies=512, models=0, lr_images=0.05),
        FYI(base="distribution-matching", base_settings={"batch_real": 10**6}),
    ],
    ids=lambda method: method.card.id,
)
def test_steps_lower_the_loss_in_networks_never_seen(method):
    own = problem_of(per_class=1)
    seed_everything(0)
    method.prepare(own)
    made = own.initial("noise")
    optimizer = method.optimizers(made)["set"]

    def value():
        torch.manual_seed(999)
        return sum(float(sum(t.detach() for t in method.losses("set", made, own, Clock(c, 99, 99)).values())) for c in range(10))

    before = value()
    torch.manual_seed(1)
    for step in range(200 if isinstance(method, NCFM) else 20):
        optimizer.zero_grad()
        sum(method.losses("set", made, own, Clock(step, 200, 200)).values()).backward()
        optimizer.step()
    assert value() < 0.8 * before


def test_each_class_has_a_draw_of_its_own_for_both_sides(monkeypatch):
    own = problem_of(per_class=2, siamese="color_crop_scale_rotate")
    monkeypatch.setattr(own, "real", lambda c, n: own.subset(own.of_class(c)[:2]).images.detach())
    made = own.subset(torch.cat([own.of_class(c)[:2] for c in range(10)]))
    torch.manual_seed(0)
    both = sides(made, own, 2, lambda x: x)
    assert torch.allclose(both.synthetic, both.real, atol=1e-5) and both.counts == both.real_counts == [2] * 10
    plain = made.images.detach()
    assert not torch.allclose(both.real, plain)
    changes = {own.siamese.draw().operation for _ in range(30)}
    assert len(changes) == 4


def test_mirrored_samples_double_the_networks_training_too(monkeypatch):
    """The inner network of gradient matching learns from pictures and mirror images under their own labels."""
    own = problem_of(per_class=1)
    fyi = FYI(base="gradient-matching", base_settings={"outer_loop": 2, "inner_loop": 1, "lr_network": 0.5, "batch_real": 4})
    fyi.prepare(own)
    made, inner = own.initial("real"), fyi._base
    network = copy.deepcopy(inner._network)
    torch.manual_seed(0)
    fyi.after_step(made, own, CLOCK)
    x = torch.cat([made.images.detach(), made.images.detach().flip(-1)])
    loss = F.cross_entropy(network(x), torch.arange(10).repeat(2))
    for p, g, q in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters())), inner._network.parameters()):
        assert torch.allclose(p - 0.5 * g, q, atol=1e-4)
    assert made.images.grad is None
    before = inner._functional.flatten(inner._network)
    fyi.after_step(made, own, Clock(1, 10, 10))  # the last update of a network: nothing more is learnt
    assert torch.equal(before, inner._functional.flatten(inner._network))


@pytest.mark.parametrize(("per_class", "loops"), [(1, (1, 1)), (10, (10, 50)), (20, (20, 25)), (30, (30, 20))])
def test_loops_follow_the_table(per_class, loops):
    method = GradientMatching()
    own = problem_of(per_class=1)
    own.per_class = per_class
    method.prepare(own)
    assert (method._outer, method._inner) == loops
