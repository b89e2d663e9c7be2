"""How far the distribution of generated features is from that of real ones: one number each, 0 for the same distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.evaluation.generation._features import block, matrices


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet (Wasserstein-2) distance of the two normal distributions with the means and covariances of `a` and `b`.

    |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), covariances over N - 1 (Dowson & Landau 1982; of features in
    Heusel et al. 2017, arXiv:1706.08500, equation 6). Covariances may be singular. It is biased upwards for small N.

    Args:
        a, b: `(N, D)`, at least 2 samples each.

    Returns:
        at least 0, smaller is better, in squared units of the features.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    a, b = matrices(2, a=a, b=b).values()
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    # with S = R'R, the trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b': no root of a rounded zero is taken
    shared = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    spread = (root_a**2).sum() + (root_b**2).sum() - 2 * shared
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + spread))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, estimated without bias.

    The kernel is that of Binkowski et al. 2018 (arXiv:1801.01401, section 4), there on Inception features; the estimator that of Gretton
    et al. 2012 (JMLR 13, lemma 6). All samples are used at once, not blocks of them.

    Args:
        a, b: `(N, D)`, at least 2 samples each.

    Returns:
        0 on average for samples of one distribution, at any N, and so often a little negative; smaller is better.

    >>> kernel_distance(torch.zeros(2, 3), torch.ones(2, 3))  # 1 + 8 - 2 * 1
    7.0
    """
    a, b = matrices(2, a=a, b=b).values()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3

    def own(x: Tensor) -> float:
        itself = (((x * x).sum(1) / x.shape[1] + 1) ** 3).sum()
        return float(sum(kernel(part, x).sum() for part in x.split(block(x))) - itself) / (len(x) * (len(x) - 1))

    across = float(sum(kernel(part, b).sum() for part in a.split(block(b)))) / (len(a) * len(b))
    return own(a) + own(b) - 2 * across


def sliced_distance(a: Tensor, b: Tensor, directions: int = 128, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance: the root of the mean, over random directions, of the squared W2 of the samples projected on them.

    On a line W2^2 is the integral of the squared difference of the quantile functions, here taken exactly for any two N (Bonneel et
    al. 2015, "Sliced and Radon Wasserstein barycenters of measures", section 2). Two samples of one distribution are not quite 0 apart.

    Args:
        a, b: `(N, D)`, at least 1 sample each.
        directions: how many; seed: which ones.

    Returns:
        at least 0, smaller is better, in units of the features.

    >>> sliced_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0], [3.0], [3.0]]))
    2.0
    """
    a, b = matrices(1, a=a, b=b).values()
    if directions < 1:
        raise UserError(f"{directions} directions", "take at least 1 direction")
    axes = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes = axes / axes.norm(dim=0)
    n, m = len(a), len(b)
    # both quantile functions are steps: in units of 1 / (n m) they change at the multiples of m and of n
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    of_a, of_b = ((side @ axes).sort(0).values[(ends - 1) // step] for side, step in ((a, m), (b, n)))
    return float((widths @ (of_a - of_b) ** 2).mean().sqrt())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and a root R `(min(N, D), D)` of the covariance: S = R'R."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R
