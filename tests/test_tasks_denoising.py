"""The denoising task: one noise for every reader of a batch, targets by hand, figures that no batch size changes."""

import pytest
import torch

import limbeck
from limbeck import zoo
from limbeck.data.batch import Batch
from limbeck.diffusion import make_process
from limbeck.errors import UserError
from limbeck.run import run_recipe
from limbeck.signals.denoising import DenoisingReader, Noising
from limbeck.tasks.denoising import Denoising, noising_of
from tests.conftest import TINY_DENOISING


def network(seed=0, **args):
    torch.manual_seed(seed)
    made = zoo.build("dit", input_shape=(1, 8, 8), classes=10, dim=16, depth=2, heads=2, **args)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made.eval()


def batch(count=5):
    rng = torch.Generator().manual_seed(0)
    return Batch(torch.rand(count, 1, 8, 8, generator=rng), torch.randint(10, (count,), generator=rng), torch.arange(count))


@pytest.mark.parametrize(("process", "prediction"), [("flow", "velocity"), ("cosine", "noise"), ("trig", "x0")])
def test_prediction_and_target_by_hand(process, prediction):
    noising = Noising(make_process(process), prediction, classes=10, doubled=True)
    net, data = network(), batch()
    torch.manual_seed(3)
    said = DenoisingReader(net, ("prediction",), noising)(data).prediction
    t, z, x0 = data.extra["noised_t"], data.extra["noised_noise"], 2 * data.inputs - 1
    a, s = (f(t)[:, None, None, None] for f in (noising.process.alpha, noising.process.sigma))
    target = {"velocity": z - x0, "noise": z, "x0": x0}[prediction]
    assert torch.allclose(said.target, target, atol=1e-5)
    assert torch.allclose(said.value, net(a * x0 + s * z, noising.process.position(t), data.labels), atol=1e-5)


def test_student_and_teacher_see_one_noise_and_the_next_batch_another():
    noising = Noising(make_process("flow"), classes=10, jitter=0.1, dropout=0.5)
    data, one, other = batch(64), network(0), network(1)
    first = DenoisingReader(one, ("logits",), noising)(data).prediction
    second = DenoisingReader(other, ("logits",), noising)(data).prediction
    assert torch.equal(first.target, second.target) and not torch.equal(first.value, second.value)
    assert not torch.equal(DenoisingReader(one, ("logits",), noising)(batch(64)).prediction.target, first.target)
    hidden = data.extra["noised_label"] == 10
    assert 10 < int(hidden.sum()) < 54 and torch.equal(data.extra["noised_label"][~hidden], data.labels[~hidden])


def test_stages_and_paths_are_read_and_a_pass_without_prediction_stops_early():
    noising, net = Noising(make_process("flow"), classes=10), network()
    said = DenoisingReader(net, ("stages", "blocks.0"), noising, grad=False, stop_early=True)(batch())
    assert [s.shape for s in said.stages] == [(5, 16, 16)] * 2 and torch.equal(said.at["blocks.0"], said.stages[0])
    assert "prediction" not in said
    with pytest.raises(UserError, match="cannot be read from a denoising network"):
        DenoisingReader(net, ("attention",), noising)


def test_figures_do_not_depend_on_the_batch_and_are_the_mean_over_four_levels():
    data = limbeck.data.open_data("digits", train=200)
    task = Denoising(tuple(data.classes), Noising(make_process("flow"), classes=10, doubled=True), steps=2)
    net, device = network(), torch.device("cpu")
    first = task.measure(net, data.test, 7, device, full=True).metrics
    assert first == task.measure(net, data.test, 512, device, full=True).metrics
    total, count = 0.0, 0
    for noised in task.noised(data.test, device):
        t, z, x0 = noised.extra["noised_t"], noised.extra["noised_noise"], 2 * noised.inputs - 1
        t4 = t[:, None, None, None]
        with torch.no_grad():
            gap = net((1 - t4) * x0 + t4 * z, t, noised.labels) - (z - x0)
        total, count = total + float(gap.square().mean((1, 2, 3)).double().sum()), count + len(t)
    assert count == 4 * len(data.test) and first["denoising_loss"] == pytest.approx(total / count, rel=1e-5)
    assert task.teacher_error(net, net, data.test, device) == 0 and task.teacher_error(net, network(1), data.test, device) > 0


def test_data_that_is_no_picture_or_lies_outside_is_refused():
    class Spec:
        process, prediction, code, latents, jitter, label_dropout = "auto", "velocity", "position", False, 0.0, 0.1

    with pytest.raises(UserError, match="denoising is of pictures"):
        noising_of(Spec, limbeck.data.open_data("wine"))
    far = limbeck.data.open_data((torch.randn(40, 1, 4, 4) * 9, torch.zeros(40, dtype=torch.long)))
    with pytest.raises(UserError, match="outside"):
        noising_of(Spec, far)


def test_a_classifier_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="CNN is no denoising network"):
        run_recipe({**TINY_DENOISING, "method": "alone", "student": {"model": "cnn"}}, out=tmp_path / "run")
