"""Density from what a network gives: kept in range, and exponentiated with a gradient that cannot overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * x.clamp(-12, 12).exp()


class _ClampInward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        outward = ((x < ctx.low) & (grad > 0)) | ((x > ctx.high) & (grad < 0))
        return grad.masked_fill(outward, 0), None, None


def truncated_exp(x: Tensor) -> Tensor:
    """exp(x), whose gradient is exp(clip(x, -12, 12)): neither overflows nor dies (Instant-NGP, arXiv:2201.05989, as torch-ngp has it).

    >>> x = torch.tensor([0.0, 20.0], requires_grad=True)
    >>> truncated_exp(x).sum().backward()
    >>> x.grad.log().round().tolist()
    [0.0, 12.0]
    """
    return _TruncatedExp.apply(x)


def clamp_inward(x: Tensor, low: float, high: float) -> Tensor:
    """x kept in [low, high]; outside, only a gradient whose descent leads back inside is let through.

    A plain clamp gives no gradient outside, so that a cell of a grid that left the range once would never come back.

    >>> x = torch.tensor([-9.0, -9.0, 0.0], requires_grad=True)
    >>> (clamp_inward(x, -7, 7) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
    >>> x.grad.tolist()
    [0.0, -1.0, 1.0]
    """
    return _ClampInward.apply(x, low, high)
