"""Gradient reversal (Ganin and Lempitsky, arXiv:1409.7495): the identity forward, minus lambda times the gradient backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """`x` itself; its gradient is multiplied by `-strength`, so that what is minimised after it is maximised before it.

    >>> x = torch.ones(2, requires_grad=True)
    >>> reverse_gradient(x, 0.5).sum().backward(); x.grad
    tensor([-0.5000, -0.5000])
    """
    return _Reverse.apply(x, strength)
