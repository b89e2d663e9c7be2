"""What a set of optimised pictures tells by itself: how different they are, and how hard their contrast is."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError

SATURATED = 0.98
"""Pixels in [-1, 1] beyond this size count as saturated."""


def pairwise_distance(x: Tensor) -> float:
    """Mean root mean squared difference of two different samples of `(N, ...)`, in units of the samples; 0 when all are alike.

    Raises:
        UserError: fewer than two samples.

    >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 3.0], [3.0, 3.0]]))
    2.0
    """
    if len(x) < 2:
        raise UserError(f"{len(x)} samples have no distance", "give at least two particles")
    flat = x.detach().flatten(1).double()
    return float(torch.nn.functional.pdist(flat).mean() / flat.shape[1] ** 0.5)


def saturation(x: Tensor, level: float = SATURATED) -> float:
    """The share of numbers of `x` whose size is above `level`: black and white pixels of pictures in [-1, 1].

    >>> saturation(torch.tensor([-1.0, 0.0, 0.5, 0.99]))
    0.5
    """
    return float((x.detach().abs() > level).double().mean())
