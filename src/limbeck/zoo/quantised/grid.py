"""The mathematics of quantised weights: scales, codes, values, and the gradient through them.

Shapes: a weight is `(G, b)` here, one row a group; codes are `(G, b)` uint8; scale and offset `(G, 1)`; points `(s,)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.zoo.quantised.scheme import Scheme, from_groups, to_groups

_TINY = 1e-10
"""Groups whose values differ by less are taken for constant; their divisor is 1 (the value of the paper's code)."""


def ranges(groups: Tensor, scheme: Scheme, clip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(scale alpha, offset beta) of each group, `(G, 1)` each; no offset where the scheme is symmetric.

    Args:
        clip: `(G, 1)` in (0, 1]: the share of the range that is kept, around its middle; values outside go to the outermost level.
    """
    if scheme.symmetric:
        most = groups.abs().amax(1, keepdim=True)
        scale = most / ((scheme.levels - 1) // 2)
        scale = torch.where(most < _TINY, torch.ones_like(scale), scale)
        return (scale if clip is None else scale * clip), None
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    width = high - low
    if clip is not None:
        low, width = low + (1 - clip) / 2 * width, width * clip
    return torch.where(width < _TINY, torch.ones_like(width), width), low


def scaled(groups: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """v = (w - beta) / alpha."""
    return (groups if offset is None else groups - offset) / scale


def codes_of(v: Tensor, scheme: Scheme, points: Tensor | None = None, stochastic: bool = False) -> Tensor:
    """The number of each value's level, `(G, b)` uint8, of scaled values `v`; outside the range the outermost level."""
    if scheme.learned:
        assert points is not None
        return torch.bucketize(v, (points[1:] + points[:-1]) / 2, right=True).to(torch.uint8)
    steps = v if scheme.symmetric else v * (scheme.levels - 1)
    if stochastic:
        low = steps.floor()
        whole = low + (torch.rand_like(steps) < steps - low)
    else:
        whole = steps.round()
    if scheme.symmetric:
        whole = whole + (scheme.levels - 1) // 2
    return whole.clamp(0, scheme.levels - 1).to(torch.uint8)


def values_of(codes: Tensor, scheme: Scheme, points: Tensor | None = None) -> Tensor:
    """q: the scaled value of each code; times alpha plus beta it is the weight."""
    if scheme.learned:
        assert points is not None
        return points[codes.long()]
    if scheme.symmetric:
        return codes.float() - (scheme.levels - 1) // 2
    return codes.float() / (scheme.levels - 1)


def decode(codes: Tensor, scale: Tensor, offset: Tensor | None, scheme: Scheme, points: Tensor | None = None) -> Tensor:
    """The weights `(G, b)` that codes stand for. Fake-quantised and packed layers both come here, so they agree to the bit."""
    weights = values_of(codes, scheme, points).to(scale.dtype) * scale
    return weights if offset is None else weights + offset


def encode(
    groups: Tensor, scheme: Scheme, points: Tensor | None = None, clip: Tensor | None = None, stochastic: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, offset) of weights `(G, b)`."""
    if scheme.backward == "truncated":
        groups = groups.clamp(-1, 1)
    scale, offset = ranges(groups, scheme, clip)
    return codes_of(scaled(groups, scale, offset), scheme, points, stochastic), scale, offset


def first_points(weight: Tensor, scheme: Scheme, axis: int = 0) -> Tensor:
    """`(s,)` the percentiles 0 to 100 of a weight's scaled values: where learned points begin (arXiv 1802.05668, section 4)."""
    groups = to_groups(weight.detach(), scheme.group, axis)
    v = from_groups(scaled(groups, *ranges(groups, scheme)), tuple(weight.shape), scheme.group, axis)
    at = torch.linspace(0, 1, scheme.levels, dtype=torch.float64, device=v.device)
    # torch.quantile takes 16 million values at most; percentiles of sorted values are read directly
    ordered = v.flatten().double().sort().values
    place = at * (len(ordered) - 1)
    low, high = ordered[place.floor().long()], ordered[place.ceil().long()]
    return (low + (high - low) * (place - place.floor())).to(weight.dtype)


def best_clip(weight: Tensor, scheme: Scheme, axis: int = 0, tries: int = 20) -> Tensor:
    """`(G, 1)` the share of each group's range that gives the least squared error, of `tries` shares from 1 down to 0.3.

    The usual help for quantisation after training: a few large weights then cost less resolution.
    """
    groups = to_groups(weight.detach(), scheme.group, axis)
    best = torch.ones_like(groups[:, :1])
    least = torch.full_like(best, float("inf"))
    for share in torch.linspace(1.0, 0.3, tries).tolist():
        clip = torch.full_like(best, share)
        error = (decode(*encode(groups, scheme, clip=clip), scheme) - groups).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, clip, best), torch.minimum(error, least)
    return best


class _Fake(torch.autograd.Function):
    """Quantised values forward, the scheme's gradient backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, points: Tensor | None, scheme: Scheme, axis: int, clip: Tensor | None, stochastic: bool
    ) -> Tensor:
        groups = to_groups(weight, scheme.group, axis)
        codes, scale, offset = encode(groups, scheme, points, clip, stochastic)
        ctx.scheme, ctx.axis, ctx.shape, ctx.clipped = scheme, axis, tuple(weight.shape), clip is not None
        ctx.save_for_backward(groups, codes, scale, *([] if offset is None else [offset]))
        return from_groups(decode(codes, scale, offset, scheme, points), ctx.shape, scheme.group, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scheme: Scheme = ctx.scheme
        groups, codes, scale, *rest = ctx.saved_tensors
        offset = rest[0] if rest else None
        own = None
        if ctx.needs_input_grad[0]:
            own = grad
            if scheme.backward == "truncated":
                own = own * (from_groups(groups, ctx.shape, scheme.group, ctx.axis).abs() <= 1)
            if scheme.backward == "complicated" or ctx.clipped:
                rows = _complicated if scheme.backward == "complicated" else _inside
                own = from_groups(rows(_grad_groups(grad, ctx), groups, codes, scale, offset, scheme), ctx.shape, scheme.group, ctx.axis)
        points = None
        if ctx.needs_input_grad[1]:
            pull = (_grad_groups(grad, ctx) * scale).flatten()
            points = torch.zeros(scheme.levels, dtype=pull.dtype, device=pull.device).index_add_(0, codes.flatten().long(), pull)
        return own, points, None, None, None, None


def _grad_groups(grad: Tensor, ctx: Any) -> Tensor:
    """The gradient as groups; padding of the last bucket has none."""
    rows = to_groups(grad, ctx.scheme.group, ctx.axis)
    extra = rows.numel() - grad.numel()
    if extra:
        rows = rows.clone()
        rows.view(-1)[-extra:] = 0
    return rows


def _inside(grad: Tensor, groups: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, scheme: Scheme) -> Tensor:
    """Straight through within the clipped range, nothing outside."""
    v = scaled(groups, scale, offset)
    half = (scheme.levels - 1) // 2
    low, high = (-half - 0.5, half + 0.5) if scheme.symmetric else (0.0, 1.0)
    return grad * ((v >= low) & (v <= high))


def _complicated(grad: Tensor, groups: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, scheme: Scheme) -> Tensor:
    """g + sum over the group of g (q - v), times d alpha / d w at the values that set the scale."""
    q = values_of(codes, scheme).to(grad.dtype)
    pull = (grad * (q - scaled(groups, scale, offset))).sum(1, keepdim=True)
    own = grad.clone()
    if scheme.symmetric:
        size = groups.abs()
        most, at = size.max(1, keepdim=True)
        pull = pull * groups.gather(1, at).sign() / ((scheme.levels - 1) // 2)
        return own.scatter_add_(1, at, torch.where(most < _TINY, 0, pull))
    (high, top), (low, bottom) = groups.max(1, keepdim=True), groups.min(1, keepdim=True)
    pull = torch.where(high - low < _TINY, 0, pull)
    return own.scatter_add_(1, top, pull).scatter_add_(1, bottom, -pull)


def fake(
    weight: Tensor, scheme: Scheme, *, axis: int = 0, points: Tensor | None = None, clip: Tensor | None = None, stochastic: bool = False
) -> Tensor:
    """The weight at its quantised values, with the scheme's gradient (see `Scheme`).

    The gradient of point k is the sum of alpha * dL/dw_q over the weights whose code is k (arXiv 1802.05668, section 4).

    Args:
        weight: of any shape.
        axis: of the output channels.
        points: `(s,)` sorted, where the scheme's levels are learned.
        clip: `(G, 1)`, see `ranges`.
        stochastic: round at random, from torch's global generator.

    Raises:
        UserError: clipped ranges with the "complicated" gradient, which is that of whole ranges.
    """
    if clip is not None and scheme.backward == "complicated":
        raise UserError("clipped ranges have no gradient through their scale here", "use backward none or truncated, or no clip")
    return _Fake.apply(weight, points, scheme, axis, clip, stochastic)


def fake_activations(x: Tensor, bits: int, tokens: bool = True) -> Tensor:
    """Inputs at symmetric levels of `bits` bits, one scale for each last axis (`tokens`) or each sample; gradient straight through."""
    high = 2 ** (bits - 1) - 1
    axes = (-1,) if tokens else tuple(range(1, x.ndim))
    most = x.detach().abs().amax(axes, keepdim=True)
    scale = torch.where(most < _TINY, torch.ones_like(most), most / high)
    return x + ((x / scale).round().clamp(-high, high) * scale - x).detach()
