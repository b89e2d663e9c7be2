"""From scores to the units that are removed: one threshold for all, or one for each kind of layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

Drops = dict[str, list[int]]


def global_threshold(scores: Mapping[str, Tensor], ratio: float, floor: Mapping[str, int]) -> Drops:
    """Units whose score is not above the `ratio` quantile of all scores (Network Slimming, arXiv 1708.06519).

    Args:
        scores: `{group: (M, units)}`; of the M layers that are tied, the largest score of a unit counts (the union of their masks).
        ratio: in [0, 1]; 0 removes nothing.
        floor: the fewest units that each group keeps.

    >>> global_threshold({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0]])}, 0.5, {"a": 1, "b": 1})
    {'a': [0], 'b': []}
    """
    return group_thresholds(scores, ratio, floor, dict.fromkeys(scores, ""))


def group_thresholds(scores: Mapping[str, Tensor], ratio: float, floor: Mapping[str, int], kinds: Mapping[str, object]) -> Drops:
    """The same with a threshold t_k of its own for each kind k of layers: keep unit c if max_m s_mc > t_k = quantile_k(ratio).

    Args:
        scores, ratio, floor: as in `global_threshold`.
        kinds: of each group; equal ones share a threshold.

    Returns:
        The units to remove, by group. Where too few would be left, those with the highest scores stay; equal scores keep the first.
    """
    pooled: dict[object, list[Tensor]] = defaultdict(list)
    for name, score in scores.items():
        pooled[kinds[name]].append(score.flatten())
    limits = {kind: float(torch.cat(parts).double().quantile(ratio)) for kind, parts in pooled.items()}
    drops: Drops = {}
    for name, score in scores.items():
        best = score.double().max(0).values
        keep = best > limits[kinds[name]] if ratio > 0 else torch.ones_like(best, dtype=torch.bool)
        order = best.argsort(descending=True, stable=True)
        keep[order[: floor[name]]] = True
        drops[name] = (~keep).nonzero().flatten().tolist()
    return drops


def floors(scores: Mapping[str, Tensor], share: float) -> dict[str, int]:
    """The fewest units that each group keeps: `share` of them rounded up, at least one.

    >>> floors({"a": torch.ones(1, 16)}, 0.1)
    {'a': 2}
    """
    return {name: max(1, math.ceil(share * score.shape[1] - 1e-9)) for name, score in scores.items()}
