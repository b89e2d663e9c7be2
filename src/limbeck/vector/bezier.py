"""Chains of cubic Bezier segments: points on them, cutting, area, and one canonical form of each closed chain."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError


def check_closed(points: Tensor, least: int = 2) -> int:
    """The number of segments of a closed chain `(..., 3 S, 2)`.

    Raises:
        UserError: the shape is no closed chain of at least `least` segments.
    """
    count, rest = divmod(points.shape[-2], 3) if points.ndim >= 2 else (0, 1)
    if points.ndim < 2 or points.shape[-1] != 2 or rest or count < least:
        raise UserError(
            f"a closed path of shape {tuple(points.shape)}",
            f"give (..., 3 S, 2) points: anchor, control, control of each of S >= {least} segments",
        )
    return count


def segments(points: Tensor, closed: bool = True) -> Tensor:
    """The segments of a chain, `(..., S, 4, 2)`.

    Args:
        points: `(..., 3 S, 2)` closed, or `(..., 3 S + 1, 2)` open.
    """
    if closed:
        count = check_closed(points, 1)
        anchors = points.unflatten(-2, (count, 3))
        return torch.cat([anchors, anchors.roll(-1, -3)[..., :1, :]], -2)
    count, rest = divmod(points.shape[-2] - 1, 3)
    if rest or count < 1:
        raise UserError(f"an open path of {points.shape[-2]} points", "give 3 S + 1 points for S segments")
    inner = points[..., :-1, :].unflatten(-2, (count, 3))
    return torch.cat([inner, points[..., 3::3, :].unsqueeze(-2)], -2)


def bernstein(t: Tensor) -> Tensor:
    """`(N, 4)` weights of the four points of a cubic at parameters `t` `(N,)`."""
    s = 1 - t
    return torch.stack([s**3, 3 * t * s**2, 3 * t**2 * s, t**3], -1)


def evaluate(curve: Tensor, t: Tensor) -> Tensor:
    """Points `(..., N, 2)` of segments `(..., 4, 2)` at parameters `(N,)` in [0, 1]."""
    return bernstein(t.to(curve)) @ curve


def split(curve: Tensor, t: float = 0.5) -> tuple[Tensor, Tensor]:
    """The two parts `(..., 4, 2)` of segments cut at a parameter (de Casteljau); together they are the same curve."""
    a = [curve[..., i, :] for i in range(4)]
    b = [a[i] + t * (a[i + 1] - a[i]) for i in range(3)]
    c = [b[i] + t * (b[i + 1] - b[i]) for i in range(2)]
    d = c[0] + t * (c[1] - c[0])
    return torch.stack([a[0], b[0], c[0], d], -2), torch.stack([d, c[1], b[2], a[3]], -2)


def polyline(points: Tensor, per_segment: int = 4, closed: bool = True) -> Tensor:
    """Points on a chain, `per_segment` a segment at equal parameters: `(..., S per_segment, 2)`; an open chain's end is added."""
    curves = segments(points, closed)
    t = torch.arange(per_segment, device=points.device, dtype=points.dtype) / per_segment
    found = evaluate(curves, t).flatten(-3, -2)
    return found if closed else torch.cat([found, points[..., -1:, :]], -2)


# half the integral of B_i dB_j - B_j dB_i over [0, 1]: the area beside a cubic is a bilinear form of its points
_AREA = torch.tensor([[0.0, 6, 3, 1], [-6, 0, 3, 3], [-3, -3, 0, 6], [-1, -3, -6, 0]], dtype=torch.float64) / 20


def signed_area(points: Tensor) -> Tensor:
    """`(...)` exact area that a closed chain encloses; positive when it runs counter-clockwise (Green's theorem)."""
    curves = segments(points)
    x, y = curves[..., 0], curves[..., 1]
    form = _AREA.to(points)
    return torch.einsum("...i,ij,...j->...", x, form, y).sum(-1)


def reverse(points: Tensor) -> Tensor:
    """The same closed chain run the other way from the same anchor."""
    return points.flip(-2).roll(1, -2)


def start_at(points: Tensor, segment: int) -> Tensor:
    """The same closed chain begun at another anchor."""
    return points.roll(-3 * segment, -2)


def canonical(points: Tensor) -> Tensor:
    """One form for each closed chain `(3 S, 2)`: counter-clockwise, begun at its lowest anchor (the leftmost of equally low ones).

    Raises:
        UserError: a path that encloses nothing or holds numbers that are not finite.
    """
    count = check_closed(points)
    if not bool(torch.isfinite(points).all()):
        raise UserError("a path holds numbers that are not finite", "leave this outline out")
    area = float(signed_area(points))
    size = float((points.amax(-2) - points.amin(-2)).max())
    if abs(area) <= 1e-6 * max(size, 1e-12) ** 2:
        raise UserError("a path encloses no area", "give an outline with an inside; a single line is a stroke")
    if area < 0:
        points = reverse(points)
    anchors = points[::3].detach()
    rounded = (anchors / max(size, 1e-12) * 1e4).round()  # so that equal heights are equal in spite of rounding
    order = sorted(range(count), key=lambda i: (float(rounded[i, 1]), float(rounded[i, 0])))
    return start_at(points, order[0])


def normalised(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chain moved and scaled so that its bounding box is centred and its longer side is 2: `(points, centre (2,), half side)`."""
    low, high = points.amin(-2), points.amax(-2)
    centre, half = (low + high) / 2, (high - low).amax(-1) / 2
    if not bool((half > 1e-9).all()):
        raise UserError("a path has no extent", "leave this outline out")
    return (points - centre.unsqueeze(-2)) / half[..., None, None], centre, half


def similar(points: Tensor, scale: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """A similarity transform: points `(..., N, 2)` scaled by `(...)`, turned by `(...)` radians, moved by `(..., 2)`."""
    c, s = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2)  # rows times this turns counter-clockwise
    return scale[..., None, None] * (points @ turn) + shift.unsqueeze(-2)
