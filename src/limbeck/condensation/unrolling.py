"""A student's training on synthetic samples as a differentiable function of them, with all its steps in memory or with one at a time.

Shapes: P weights in one vector, N inner steps. A step's loss is a function `loss(weights, k)` that is differentiable in the weights
`(P,)` and in whatever is learnt; called twice with the same k it must give the same graph (the same samples, the same augmentation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

StepLoss = Callable[[Tensor, int], Tensor]


def unroll(loss: StepLoss, start: Tensor, steps: int, rate: Tensor, momentum: float = 0.0) -> list[Tensor]:
    """`[w_0, w_1, ..., w_N]` with w_{k+1} = w_k - rate * m_k, m_k = momentum * m_{k-1} + grad loss(w_k, k); the whole graph is kept.

    Args:
        loss: of one step.
        start: `(P,)`.
        steps: N.
        rate: a scalar tensor, itself learnable.
        momentum: heavy-ball; 0 in trajectory matching, 0.9 in AST.
    """
    weights = [start if start.requires_grad else start.detach().requires_grad_(True)]
    velocity: Tensor | None = None
    for k in range(steps):
        (gradient,) = torch.autograd.grad(loss(weights[-1], k), weights[-1], create_graph=True)
        velocity = gradient if velocity is None or not momentum else momentum * velocity + gradient
        weights.append(weights[-1] - rate * velocity)
    return weights


def train(loss: StepLoss, start: Tensor, steps: int, rate: Tensor, momentum: float = 0.0) -> Tensor:
    """The end `(P,)` of the same training as `unroll`, without a graph."""
    weights, velocity = start.detach(), torch.zeros_like(start)
    for k in range(steps):
        weights = weights.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(weights, k), weights)
        velocity = momentum * velocity + gradient
        weights = weights.detach() - rate.detach() * velocity
    return weights.detach()


def trajectory_distance(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """|end - target|^2 / |start - target|^2: 0 when the student arrives, 1 when it has come no nearer (Cazenavette et al. 2022, eq. 2)."""
    return ((end - target) ** 2).sum() / ((start - target) ** 2).sum()


def constant_memory_gradient(
    loss: StepLoss, start: Tensor, target: Tensor, steps: int, rate: Tensor, learnt: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Value and gradients of the trajectory distance with one inner step in memory at a time (TESLA, Cui et al. 2023, arXiv:2211.10586).

    With G the sum of the steps' gradients, L = |start - rate G - target|^2 / D. Every w_k counts as a constant, so that step k
    contributes (2 / D) (rate (target - start) + rate^2 G)^T d g_k / d learnt: the way over later steps is left out (it is an
    approximation from two steps on, exact with one). The released code has half this gradient.

    Args:
        loss: of one step.
        start, target: `(P,)`.
        steps: N.
        rate: a scalar tensor.
        learnt: what gradients are wanted for (images, label logits).

    Returns:
        the value, its gradient for the rate, and its gradients for `learnt`.
    """
    step_size = rate.detach()
    weights, total = start.detach(), torch.zeros_like(start)
    for k in range(steps):
        weights = weights.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(weights, k), weights)
        total += gradient
        weights = weights.detach() - step_size * gradient
    scale = ((start - target) ** 2).sum()
    gap = start - step_size * total - target
    value = (gap @ gap) / scale
    along = (2 / scale) * (step_size * (target - start) + step_size**2 * total)
    found = [torch.zeros_like(tensor) for tensor in learnt]
    weights = start.detach()
    for k in range(steps):  # the same steps again, now with the graph from each gradient to the samples
        weights = weights.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(weights, k), weights, create_graph=True)
        parts = torch.autograd.grad(gradient, learnt, along, allow_unused=True)
        found = [old if part is None else old + part for old, part in zip(found, parts)]
        weights = weights.detach() - step_size * gradient.detach()
    return value.detach(), -2 * (gap @ total) / scale, [part.detach() for part in found]
