"""Choosing real samples instead of making synthetic ones: what every condenser is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def centres(x: Tensor, count: int, seed: int) -> Tensor:
    """`(count, ...)` k-means centres of samples `(N, ...)` (scikit-learn's k-means++ with ten starts)."""
    from sklearn.cluster import KMeans

    flat = x.flatten(1).double().cpu().numpy()
    found = KMeans(count, n_init=10, random_state=seed % 2**32).fit(flat).cluster_centers_
    return torch.from_numpy(found).to(x).view(count, *x.shape[1:])


def nearest_to_centres(x: Tensor, count: int, seed: int) -> Tensor:
    """`(count,)` positions of distinct samples, each the nearest to one k-means centre (on the CPU).

    A sample that is nearest to two centres goes to the first, the second takes its next nearest.
    """
    distance = torch.cdist(centres(x, count, seed).flatten(1), x.flatten(1))
    chosen: list[int] = []
    for row in distance.argsort(1).tolist():
        chosen.append(next(position for position in row if position not in chosen))
    return torch.tensor(chosen)


def herding(features: Tensor, count: int) -> Tensor:
    """`(count,)` positions chosen one by one so that their mean stays closest to the mean of all (Welling 2009; iCaRL's exemplars).

    Args:
        features: `(N, D)`.
    """
    features = features.flatten(1).double()
    target, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for number in range(1, count + 1):
        gap = ((total + features) / number - target).norm(dim=1)
        pick = int(gap.masked_fill(~free, torch.inf).argmin())
        chosen.append(pick)
        free[pick] = False
        total = total + features[pick]
    return torch.tensor(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """`(count,)` positions: the sample nearest to the mean, then greedily the one farthest from all chosen (Sener & Savarese 2018)."""
    features = features.flatten(1).double()
    chosen = [int((features - features.mean(0)).norm(dim=1).argmin())]
    gap = (features - features[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        gap[chosen] = -1.0  # equal samples must not be taken twice
        chosen.append(int(gap.argmax()))
        gap = torch.minimum(gap, (features - features[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)
