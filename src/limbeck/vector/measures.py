"""How clean closed paths are: crossings with themselves, and sharp turns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.vector.bezier import polyline


def _crossings(lines: Tensor) -> Tensor:
    """`(..., N, N)` bool: pieces of a closed polyline `(..., N, 2)` that properly cross, above the diagonal; neighbours cannot."""
    a, b = lines, lines.roll(-1, -2)
    count = lines.shape[-2]

    def side(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
        """Which side of p-q the point r is on; `(..., N, N)`, p and q by row, r by column."""
        p, q, r = p.unsqueeze(-2), q.unsqueeze(-2), r.unsqueeze(-3)
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0])

    of_columns = side(a, b, a) * side(a, b, b) < 0
    of_rows = of_columns.mT
    place = torch.arange(count, device=lines.device)
    gap = (place[:, None] - place).abs()
    apart = (gap > 1) & (gap < count - 1) & (place[:, None] < place)
    return of_columns & of_rows & apart


@torch.no_grad()
def self_intersections(points: Tensor, per_segment: int = 8) -> Tensor:
    """`(...)` how many times closed chains `(..., 3 S, 2)` cross themselves, on polylines of `per_segment` pieces a segment."""
    return _crossings(polyline(points.double(), per_segment)).sum((-2, -1))


def intersection_rate(points: Tensor, per_segment: int = 8) -> float:
    """The share of paths `(N, 3 S, 2)` that cross themselves at least once; 0 when there are none."""
    if not len(points):
        return 0.0
    return float((self_intersections(points, per_segment) > 0).double().mean())


@torch.no_grad()
def jaggedness(points: Tensor, per_segment: int = 8) -> Tensor:
    """`(...)` radians that closed chains turn beyond the one full turn that every simple path makes: total |turning angle| - 2 pi.

    0 for a convex outline of any shape and smoothness; every dent, kink and zigzag adds to it. Pieces shorter than 1e-6 of the path's
    extent have no direction and are left out (their turn is seen between their neighbours only if these are long enough).
    """
    lines = polyline(points.double(), per_segment)
    steps = lines.roll(-1, -2) - lines
    flat = steps.reshape(-1, *steps.shape[-2:])
    extent = (lines.amax(-2) - lines.amin(-2)).amax(-1).reshape(-1)
    found = []
    for own, size in zip(flat, extent):
        own = own[own.norm(dim=-1) > 1e-6 * size]
        following = own.roll(-1, 0)
        cross = own[:, 0] * following[:, 1] - own[:, 1] * following[:, 0]
        found.append(torch.atan2(cross, (own * following).sum(-1)).abs().sum() - 2 * math.pi)
    return torch.stack(found).reshape(steps.shape[:-2]) if found else steps.new_zeros(steps.shape[:-2])
