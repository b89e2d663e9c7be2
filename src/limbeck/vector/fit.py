"""A closed chain in a given number of segments: cut where it has too few, fitted by least squares where it has too many."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.vector.bezier import check_closed, segments, split

DENSE = 12
"""Points that stand for a segment while curves are fitted to it."""


def _fit(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The cubic `(4, 2)` with the ends of a row of points `(N, 2)` that is nearest to them at chord-length parameters, and the sum of
    squared errors weighted by length (Schneider 1990, without his reparametrisation)."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    total = steps.sum()
    a, b = points[0], points[-1]
    if total <= 0 or len(points) < 4:
        return np.stack([a, a + (b - a) / 3, a + (b - a) * 2 / 3, b]), 0.0
    t = np.concatenate([[0.0], steps.cumsum() / total])
    s = 1 - t
    p, q = 3 * t * s * s, 3 * t * t * s
    rest = points - np.outer(s**3, a) - np.outer(t**3, b)
    pp, pq, qq = p @ p + 1e-12, p @ q, q @ q + 1e-12
    u, v = p @ rest, q @ rest
    size = pp * qq - pq * pq
    inner = np.stack([(qq * u - pq * v) / size, (pp * v - pq * u) / size])
    error = rest - np.outer(p, inner[0]) - np.outer(q, inner[1])
    return np.stack([a, inner[0], inner[1], b]), float((error * error).sum() / len(points) * total)


def _length(points: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def resegment(points: Tensor, count: int) -> Tensor:
    """A closed chain `(3 S, 2)` as one of `count` segments, `(3 count, 2)` in its own dtype.

    With fewer segments than that the longest ones are cut in two, which changes nothing of the curve. With more, the two neighbours that a
    single cubic replaces at the least error are merged until as many are left.

    Raises:
        UserError: fewer than 2 segments asked for, or no closed chain.
    """
    if count < 2:
        raise UserError(f"a closed path of {count} segments", "give at least 2")
    check_closed(points)
    curves = list(segments(points.detach().double()))
    while len(curves) < count:
        lengths = [float((c[1:] - c[:-1]).norm(dim=-1).sum()) for c in curves]
        at = lengths.index(max(lengths))
        curves[at : at + 1] = split(curves[at])
    if len(curves) == count:
        return torch.cat([c[:3] for c in curves]).to(points)
    return torch.from_numpy(_merged([c.numpy() for c in curves], count)).to(points)


def _merged(curves: list[np.ndarray], count: int) -> np.ndarray:
    t = np.linspace(0, 1, DENSE + 1)[:, None]
    s = 1 - t
    rows = [s**3 * c[0] + 3 * t * s**2 * c[1] + 3 * t**2 * s * c[2] + t**3 * c[3] for c in curves]

    def joined(i: int) -> tuple[np.ndarray, np.ndarray, float]:
        both = np.concatenate([rows[i], rows[(i + 1) % len(rows)][1:]])
        return (both, *_fit(both))

    offers = [joined(i) for i in range(len(rows))]
    fitted = list(curves)
    while len(rows) > count:
        at = min(range(len(rows)), key=lambda i: offers[i][2])
        if at == len(rows) - 1:  # the pair runs over the start: begin one segment later
            rows, fitted, offers = (row[1:] + row[:1] for row in (rows, fitted, offers))
            at -= 1
        rows[at : at + 2], fitted[at : at + 2] = [offers[at][0]], [offers[at][1]]
        del offers[at + 1]
        offers[at], offers[at - 1] = joined(at), joined((at - 1) % len(rows))
    return np.concatenate([curve[:3] for curve in fitted])
