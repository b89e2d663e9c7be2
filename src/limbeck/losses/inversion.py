"""What images must satisfy that are made from a trained network: its BatchNorm statistics, and smoothness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses._rows import wide


def statistics_distance(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_variances: Sequence[Tensor],
    first: float = 10.0,
) -> Tensor:
    """Sum over BatchNorm layers of |var - running var|_2 + |mean - running mean|_2 (not squared); layer 0 counts `first` times.

    (Yin et al. 2020, arXiv:1912.08795, equation 4; the weight of the first layer is that of SRe2L's code.)

    Args:
        means, variances: `(C_l,)` of the batch at the input of each layer; the variance is the biased one.
        running_means, running_variances: of the network.

    >>> one = [torch.ones(4)]
    >>> float(statistics_distance(one, one, one, [torch.zeros(4)], first=1.0))
    2.0
    """
    if not means:
        raise UserError("there are no BatchNorm statistics to match", "the network needs BatchNorm layers")
    terms = []
    for number, (m, v, rm, rv) in enumerate(zip(means, variances, running_means, running_variances)):
        own = (wide(v) - wide(rv)).norm() + (wide(m) - wide(rm)).norm()
        terms.append(own * first if number == 0 else own)
    return torch.stack(terms).sum()


def image_variation(x: Tensor) -> Tensor:
    """Sum of the Frobenius norms of the differences to the neighbours on the right, below, and on both diagonals.

    Args:
        x: `(B, C, H, W)`.

    >>> float(image_variation(torch.ones(1, 1, 4, 4)))
    0.0
    """
    x = wide(x)
    right, below = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
    falling, rising = x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]
    return right.norm() + below.norm() + falling.norm() + rising.norm()
