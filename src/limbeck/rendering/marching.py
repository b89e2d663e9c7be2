"""Volume rendering: points along rays, and the colour that emission and absorption make of them (Max 1995; NeRF, arXiv:2003.08934, eq. 3).

Shapes: R rays, S points on each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.rendering.cameras import Cameras
from limbeck.rendering.density import truncated_exp


@dataclass
class Rendered:
    """What rays see.

    Attributes:
        colour: `(R, 3)`, over the background where one was given.
        depth: `(R,)` mean distance from the camera, weighted; what is not absorbed counts nothing.
        opacity: `(R,)` share of the light that does not come from the background.
        weights: `(R, S)` of the points; with the transmittance at the end they sum to 1.
    """

    colour: Tensor
    depth: Tensor
    opacity: Tensor
    weights: Tensor


def cube_bounds(origins: Tensor, directions: Tensor, bound: float, nearest: float = 0.05) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the cube [-bound, bound]^3, `(R,)` each; equal for rays that miss it.

    Args:
        nearest: the least distance that counts, for cameras inside the cube.
    """
    inverse = 1 / torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    a, b = (-bound - origins) * inverse, (bound - origins) * inverse
    near = torch.minimum(a, b).amax(-1).clamp_min(nearest)
    far = torch.maximum(a, b).amin(-1)
    return near, torch.maximum(near, far)


def depths_along(near: Tensor, far: Tensor, count: int, jitter: bool) -> tuple[Tensor, Tensor]:
    """Distances of points and lengths of their intervals, `(R, count)` each: one point in each of `count` equal intervals.

    Args:
        jitter: a random place in each interval, from torch's global generator; else its middle.
    """
    place = torch.rand(len(near), count, device=near.device) if jitter else torch.full((1, count), 0.5, device=near.device)
    step = ((far - near) / count)[:, None]
    depths = near[:, None] + step * (torch.arange(count, device=near.device) + place)
    return depths, step.expand(-1, count)


def composite(log_density: Tensor, colour: Tensor, depths: Tensor, lengths: Tensor, background: Tensor | None = None) -> Rendered:
    """C = sum_i T_i (1 - exp(-sigma_i delta_i)) c_i + T_end background, T_i = exp(-sum_(j<i) sigma_j delta_j), sigma = exp(log density).

    Args:
        log_density: `(R, S)`. colour: `(R, S, 3)`. depths, lengths: `(R, S)`, see `depths_along`.
        background: `(R, 3)` or `(3,)`; None adds none.
    """
    thickness = truncated_exp(log_density) * lengths
    passed = torch.cumsum(thickness, -1)
    weights = torch.exp(-(passed - thickness)) * -torch.expm1(-thickness)
    seen = (weights[..., None] * colour).sum(-2)
    if background is not None:
        seen = seen + torch.exp(-passed[:, -1:]) * background
    return Rendered(seen, (weights * depths).sum(-1), -torch.expm1(-passed[:, -1]), weights)


Reads = Callable[[Tensor, Tensor], Any]
"""A field: positions and directions `(P, 3)` give something with `log_density` `(P,)` and `colour` `(P, 3)`."""


def render(
    field: Reads,
    origins: Tensor,
    directions: Tensor,
    bound: float,
    points: int,
    background: Tensor | None = None,
    jitter: bool = False,
) -> Rendered:
    """What rays see of a field inside the cube [-bound, bound]^3.

    Args:
        origins, directions: `(R, 3)`. points: on each ray. background, jitter: see `composite` and `depths_along`.
    """
    depths, lengths = depths_along(*cube_bounds(origins, directions, bound), points, jitter)
    places = origins[:, None] + depths[..., None] * directions[:, None]
    found = field(places.reshape(-1, 3), directions[:, None].expand_as(places).reshape(-1, 3))
    log_density, colour = found.log_density.to(depths.dtype), found.colour.to(depths.dtype)  # of networks in a half-precision type
    return composite(log_density.view_as(depths), colour.view(*depths.shape, 3), depths, lengths, background)


@torch.no_grad()
def render_views(field: Reads, cameras: Cameras, bound: float, points: int, background: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Whole pictures `(N, 3, H, W)` in [0, 1] and depths `(N, H, W)`, without gradient, `chunk` rays at a time."""
    pictures, depths = [], []
    for number in range(len(cameras)):
        origins, directions = cameras.all_rays(number)
        parts = [render(field, o, d, bound, points, background) for o, d in zip(origins.split(chunk), directions.split(chunk), strict=True)]
        pictures.append(torch.cat([part.colour for part in parts]).view(cameras.height, cameras.width, 3).permute(2, 0, 1))
        depths.append(torch.cat([part.depth for part in parts]).view(cameras.height, cameras.width))
    return torch.stack(pictures).clamp(0, 1), torch.stack(depths)
