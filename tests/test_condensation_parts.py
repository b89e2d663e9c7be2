"""Losses that are a sum over classes: the gradient is formed class by class, and is that of the plain sum."""

import pytest
import torch

from limbeck import recipe as schema
from limbeck.condensation.matching import part_by_part
from limbeck.condensation.methods.distribution_matching import DistributionMatching
from limbeck.condensation.methods.gradient_matching import GradientMatching
from limbeck.condensation.problem import Problem
from limbeck.data import open_data
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from tests.conftest import saved_bytes

torch.set_num_threads(1)


def _parts():
    """A chain in front of the parts, parts of several sizes, a loss of each that is not quadratic."""
    leaf = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(4, dtype=torch.float64, requires_grad=True)
    return leaf, scale, [2, 3, 4], lambda part, number: (number + 1) * (part.tanh() @ torch.arange(4.0).double()).exp().mean()


def test_part_by_part_is_the_plain_sum():
    """Value and gradient of everything before the parts, also when the sum is one of several terms with a factor."""
    torch.manual_seed(0)
    leaf, scale, sizes, loss_of = _parts()
    plain = sum(loss_of(part, number) for number, part in enumerate((leaf * scale).split(sizes)))
    wanted = torch.autograd.grad(3 * plain + leaf.sum(), (leaf, scale))
    ours = part_by_part(leaf * scale, sizes, loss_of)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * ours + leaf.sum(), (leaf, scale)), wanted)
    with torch.no_grad():
        quiet = part_by_part(leaf * scale, sizes, loss_of)
    assert not quiet.requires_grad and torch.equal(quiet, ours.detach())


def test_part_by_part_under_a_scaler_is_formed_by_the_backward_pass(monkeypatch):
    """Under float16 autocast nothing may be formed before the loss is enlarged."""
    leaf, scale, sizes, loss_of = _parts()
    formed = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: formed.append(given))
    with torch.autocast("cpu", torch.float16):
        loss = part_by_part(leaf * scale, sizes, loss_of)
    assert not formed
    loss.backward()
    assert bool(leaf.grad.abs().sum() > 0)


@pytest.mark.parametrize("method", [DistributionMatching(batch_real=4), GradientMatching(batch_real=4, outer_loop=1, inner_loop=1)])
def test_the_graph_of_one_class_is_held_at_a_time(method):
    """Twice the classes do not double what autograd holds (they would, if the graphs of all were kept until the backward pass)."""

    def held(classes: int) -> int:
        torch.manual_seed(0)
        x, y = torch.rand(12 * classes, 3, 32, 32), torch.arange(12 * classes) % classes
        problem = Problem(
            open_data({"train": (x, y), "test": (x, y)}),
            schema.Condense(per_class=12),
            schema.Model(model="convnet", args={"width": 8, "depth": 2}),
            Session(),
        )
        method.prepare(problem)
        made = method.begin(problem)
        most = saved_bytes(lambda: sum(method.losses("set", made, problem, Clock(0, 1, 1)).values()).backward())
        return most - made.images.numel() * 4  # the gradient of the images themselves

    assert held(6) < 1.3 * held(3)
