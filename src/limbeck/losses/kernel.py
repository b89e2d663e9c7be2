"""Kernel ridge regression in closed form, and the redundancy loss of self-supervised teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses._rows import wide


def _with_bias(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def kernel_ridge_prediction(support: Tensor, targets: Tensor, queries: Tensor, ridge: float = 1e-6) -> Tensor:
    """`(B, d)`: what linear regression of the support's targets says about the queries: K_qs (K_ss + lambda I)^{-1} Y_s.

    K is the product of the features with a column of ones, lambda = ridge * trace(K_ss), detached. Solved in float64: K_ss is n x n and has
    rank p + 1 at most. (Lee et al. 2023, arXiv:2310.06511, equation 5.)

    Args:
        support: `(n, p)` features of the synthetic samples. targets: `(n, d)`. queries: `(B, p)` features of real samples.
        ridge: relative to the trace.

    >>> x = torch.eye(3)
    >>> bool(torch.allclose(kernel_ridge_prediction(x, 2 * x, x), 2 * x, atol=1e-3))
    True
    """
    if ridge <= 0:
        raise UserError(f"the ridge is {ridge}", "give a positive number: the kernel matrix need not have full rank")
    own, other = _with_bias(wide(support).double()), _with_bias(wide(queries).double())
    kernel = own @ own.T
    strength = ridge * kernel.detach().trace()
    weights = torch.linalg.solve(kernel + strength * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device), targets.double())
    return (other @ own.T @ weights).to(wide(support).dtype)


def barlow_twins(first: Tensor, second: Tensor, redundancy: float = 5e-3) -> Tensor:
    """sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2, C the correlation over the batch of two views' features.

    (Zbontar et al. 2021, arXiv:2103.03230, equation 1.)

    Args:
        first, second: `(B, d)` features of two views of the same samples.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> float(barlow_twins(z, z))
    0.0
    """
    a, b = ((wide(z) - wide(z).mean(0)) / wide(z).std(0, unbiased=False).clamp_min(1e-5) for z in (first, second))
    table = a.T @ b / len(a)
    diagonal = table.diagonal()
    return ((1 - diagonal) ** 2).sum() + redundancy * ((table**2).sum() - (diagonal**2).sum())
