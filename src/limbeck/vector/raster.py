"""Pictures of paths, differentiable in their points: signed distance to a fine polyline, then a soft step."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError, unknown
from limbeck.vector.bezier import polyline

RULES = ("nonzero", "evenodd")


def grid(size: int, like: Tensor) -> Tensor:
    """`(size * size, 2)` centres of the pixels of the square [-1, 1] x [-1, 1], row by row from the top (y falls with the row)."""
    if size < 1:
        raise UserError(f"a picture of {size} pixels", "give a size of at least 1")
    line = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(-line, line, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _distance(pixels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """`(..., P)` distance of pixels `(P, 2)` to the nearest of line pieces `(..., N, 2)`."""
    along = (end - start).unsqueeze(-3)
    away = pixels[:, None] - start.unsqueeze(-3)
    size = along.square().sum(-1).clamp_min(1e-12)
    place = ((away * along).sum(-1) / size).clamp(0, 1)
    squared = (away - place.unsqueeze(-1) * along).square().sum(-1)
    return (squared.amin(-1) + 1e-12).sqrt()


@torch.no_grad()
def winding(pixels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """`(..., P)` how often line pieces `(..., N, 2)` that close run round pixels `(P, 2)`, counter-clockwise counted positive.

    A ray to the right counts upward crossings minus downward ones; a crossing takes its lower end and leaves its upper one.
    """
    y, x = pixels[:, None, 1], pixels[:, None, 0]
    x0, y0, x1, y1 = (v.unsqueeze(-2) for v in (start[..., 0], start[..., 1], end[..., 0], end[..., 1]))
    side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
    up = (y0 <= y) & (y1 > y) & (side > 0)
    down = (y0 > y) & (y1 <= y) & (side < 0)
    return (up.int() - down.int()).sum(-1)


def signed_distance(lines: Tensor, size: int, rule: str = "nonzero") -> Tensor:
    """`(..., size, size)` distance of every pixel to a closed polyline `(..., N, 2)`, positive inside.

    Gradients reach the points through the distance; which side a pixel is on is a constant. The side only changes where the distance is 0,
    so the result is continuous, and differentiable except where two pieces are equally near.

    Args:
        rule: "nonzero" or "evenodd": what counts as inside where a path runs over itself.
    """
    if rule not in RULES:
        raise unknown("fill rule", rule, RULES)
    pixels, end = grid(size, lines), lines.roll(-1, -2)
    turns = winding(pixels, lines, end)
    inside = turns != 0 if rule == "nonzero" else turns % 2 != 0
    distance = _distance(pixels, lines, end)
    return torch.where(inside, distance, -distance).unflatten(-1, (size, size))


def coverage(points: Tensor, size: int, softness: float | None = None, per_segment: int = 4, rule: str = "nonzero") -> Tensor:
    """`(..., size, size)` in (0, 1): how far a closed chain covers each pixel, sigmoid(signed distance / softness).

    Args:
        points: `(..., 3 S, 2)`.
        softness: in units of the square's half side; None: a quarter of a pixel's side (the slope of an edge's exact coverage).
        per_segment: line pieces that stand for one cubic.
    """
    softness = 0.5 / max(size, 1) if softness is None else softness
    return torch.sigmoid(signed_distance(polyline(points, per_segment), size, rule) / softness)


def stroke_coverage(
    points: Tensor, width: Tensor | float, size: int, softness: float | None = None, per_segment: int = 4, closed: bool = False
) -> Tensor:
    """`(..., size, size)` in (0, 1): a line of a width along a chain, sigmoid((width / 2 - distance) / softness).

    Args:
        points: `(..., 3 S + 1, 2)` open or `(..., 3 S, 2)` closed. width: one for all or `(...)`.
    """
    softness = 0.5 / max(size, 1) if softness is None else softness
    lines = polyline(points, per_segment, closed)
    start, end = (lines, lines.roll(-1, -2)) if closed else (lines[..., :-1, :], lines[..., 1:, :])
    half = torch.as_tensor(width, dtype=points.dtype, device=points.device)[..., None] / 2
    return torch.sigmoid((half - _distance(grid(size, points), start, end)) / softness).unflatten(-1, (size, size))
