"""Sharpness-aware gradients: the direction of GSAM (Zhuang et al. 2022, arXiv:2203.08065), plain or adaptive (ASAM, arXiv:2102.11600)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TINY = 1e-12


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(a, b)), torch.zeros((), device=a[0].device))


def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool) -> list[Tensor]:
    """The perturbation that raises the loss most: rho g / |g|, or adaptively rho w^2 g / | |w| g | (weights count by their size)."""
    if adaptive:
        size = _dot([(w.abs() * g) for w, g in zip(weights, gradients)], [(w.abs() * g) for w, g in zip(weights, gradients)]).sqrt()
        return [rho * g * w * w / (size + TINY) for w, g in zip(weights, gradients)]
    size = _dot(gradients, gradients).sqrt()
    return [rho * g / (size + TINY) for g in gradients]


def gsam_direction(
    loss: Callable[[], Tensor], weights: Sequence[nn.Parameter], rho: float, alpha: float, adaptive: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the direction g' - alpha * v in place of its gradient.

    g' is the gradient at w + e (see `ascent`), v the part of g that is orthogonal to g'. With rho = 0 and alpha = 0 it is the gradient.

    Args:
        loss: computed at the present weights each time it is called; must be deterministic.
        weights: changed and put back, bit for bit.
        rho: size of the perturbation.
        alpha: how much the surrogate gap is pressed down.

    Returns:
        the loss at the weights (detached), and a direction for each weight.
    """
    value = loss()
    gradients = torch.autograd.grad(value, weights)
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, e in zip(weights, ascent(kept, gradients, rho, adaptive)):
            w.add_(e)
    moved = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for w, old in zip(weights, kept):
            w.copy_(old)
    size, size_moved = _dot(gradients, gradients).sqrt(), _dot(moved, moved).sqrt()
    cosine = _dot(gradients, moved) / (size * size_moved + TINY)
    along = cosine * size / (size_moved + TINY)
    return value.detach(), [m - alpha * (g - along * m) for g, m in zip(gradients, moved)]
