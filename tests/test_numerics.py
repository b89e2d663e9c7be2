"""Every exported loss in float16, bfloat16 and float32 against float64, at extreme inputs, and where there is next to nothing to score.

Inputs are rounded to the type first, so that both computations see the same numbers. A loss promises to be computed in float32: its value
may differ from the one in float64 by what inputs that are a few float32 steps away would change, and no more for the two short types.
Gradients come back in the type of the inputs and are rounded to it once.
"""

import importlib
import pkgutil

import pytest
import torch

from limbeck import losses
from limbeck.errors import UserError
from tests.loss_calls import CALLS, NO_LOSSES, STYLES, Draw

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STEPS = 32
"""Roundings that a result may have behind it: the losses are chains of some ten operations, sums of up to some thirty terms."""
EPS = torch.finfo(torch.float32).eps


def run(call, draw, dtype, change=None):
    """Values and gradients of a call with its tensors rounded to `dtype` (None: not rounded), then computed in that type, or in float64."""
    function, tensors = call.build(draw)
    taken = []
    for tensor in tensors:
        tensor = change(tensor) if change else tensor
        taken.append(tensor.to(dtype) if call.gradient is False else tensor.to(dtype).requires_grad_(True))
    found = function(*taken)
    found = [value for value in (found if isinstance(found, tuple) else (found,)) if isinstance(value, torch.Tensor)]
    if not call.gradient:
        return found, []
    shares = torch.Generator().manual_seed(1)
    total = sum((value * torch.rand(value.shape, generator=shares, dtype=torch.float64).to(value.dtype)).sum() for value in found)
    slopes = torch.autograd.grad(total, taken, allow_unused=True)
    return [value.detach() for value in found], [slope for slope in slopes if slope is not None]


def largest(tensor):
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def test_every_exported_loss_has_a_call():
    """A loss that is exported and not called here fails this test."""
    packages = ["limbeck.losses"]
    for found in pkgutil.walk_packages(losses.__path__, "limbeck.losses."):
        if found.ispkg:
            packages.append(found.name)
    exported = {f"{name}:{item}" for name in packages for item in importlib.import_module(name).__all__}
    called = {name.split(" ")[0] for name in CALLS}
    assert exported - called - set(NO_LOSSES) == set(), "give each a builder in tests/loss_calls.py"
    assert called <= exported and set(NO_LOSSES) <= exported


def nearby(dtype, step, generator):
    """Rounds a tensor to `dtype` and moves every number by up to one relative `step`."""
    return lambda x: x.to(dtype).double() * (1 + step * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))


def condition(call, seed, dtype, exact, step):
    """The largest change of each exact result when inputs move by one step, of four tries."""
    generator, spread = torch.Generator().manual_seed(2), [0.0] * len(exact)
    for _ in range(4):
        values, slopes = run(call, Draw(seed=seed), torch.float64, nearby(dtype, step, generator))
        spread = [max(s, float((a - b).abs().max())) for s, a, b in zip(spread, exact, [*values, *slopes])]
    return spread


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CALLS)
def test_precision(name, seed):
    """Value and gradient against float64 at plain inputs."""
    call = CALLS[name]
    for kind, dtype in TYPES.items():
        eps = torch.finfo(dtype).eps
        step = eps if call.rounded else EPS
        values, slopes = run(call, Draw(seed=seed), dtype)
        exact, exact_slopes = run(call, Draw(seed=seed), torch.float64, lambda x, d=dtype: x.to(d).double())
        spread = condition(call, seed, dtype, [*exact, *exact_slopes], step)
        for value, wanted, change in zip(values, exact, spread):
            assert value.dtype is torch.float32, f"{kind}: the result is {value.dtype}"
            allowed = STEPS * (step * max(1.0, largest(wanted)) + change)
            wrong = largest(value.double() - wanted)
            assert wrong <= allowed, f"{kind}: value off by {wrong:.3g}, allowed {allowed:.3g}"
        for slope, wanted, change in zip(slopes, exact_slopes, spread[len(exact) :]):
            assert slope.dtype is dtype
            allowed = eps * largest(wanted) + STEPS * (step * largest(wanted) + change) + torch.finfo(dtype).smallest_normal
            wrong = largest(slope.double() - wanted)
            assert wrong <= allowed, f"{kind}: gradient off by {wrong:.3g}, allowed {allowed:.3g}"


def finite(name, draw):
    """Finite value and gradient in every type, or a clear error in all.

    One thing no formula can change: where the true gradient is beyond float16's largest number (65504), its float16 form is infinite there
    (never NaN), and a gradient scaler sees it. float32 and bfloat16 have no such excuse.
    """
    call = CALLS[name]
    for kind, dtype in TYPES.items():
        try:
            values, slopes = run(call, draw(), dtype)
        except UserError as error:
            assert error.message and error.hint
            continue
        for value in values:
            assert bool(torch.isfinite(value).all()), f"{kind}: the value is {value}"
        for number, slope in enumerate(slopes):
            bad = ~torch.isfinite(slope)
            if dtype is torch.float16 and bool(bad.any()):
                exact = run(call, draw(), torch.float64, lambda x: x.half().double())[1][number]
                bad &= slope.isnan() | (exact.abs() < 0.9 * torch.finfo(dtype).max)
            assert not bool(bad.any()), f"{kind}: the gradient is {slope}"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CALLS)
def test_extreme_inputs(name, style):
    """Logits and features of +-1e4, one-hot teachers, equal sides, a student of zeros."""
    finite(name, lambda: Draw(style=style))


@pytest.mark.parametrize("name", CALLS)
def test_next_to_nothing(name):
    """One class, a batch of one, both, and both at extremes."""
    for rows, width in ((6, 1), (1, 5), (1, 1)):
        for style in ("plain", "one high", "equal"):
            finite(name, lambda r=rows, w=width, s=style: Draw(rows=r, width=w, style=s))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.masked])
def test_nothing_scored(name):
    """No scored row: the value is exactly zero, and so is every gradient, also at extremes."""
    for style in ("plain", "one high"):
        for dtype in TYPES.values():
            values, slopes = run(CALLS[name], Draw(hidden=True, style=style), dtype)
            assert all(float(value.abs().sum()) == 0 for value in values)
            assert slopes and all(float(slope.abs().sum()) == 0 for slope in slopes)
