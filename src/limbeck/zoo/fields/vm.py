"""A field that is a sum of products of planes and lines."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.zoo.fields.field import CLIP, GEO, ColourHead, Field
from limbeck.zoo.network import positive

PLANES = ((0, 1), (0, 2), (1, 2))
"""The axes of the three planes."""

LINES = (2, 1, 0)
"""The axis of the line that goes with each."""


class VMField(Field):
    """A radiance field as vector-matrix tensors (TensoRF, arXiv:2203.09517): T = sum_r v_r^z o M_r^xy + v_r^y o M_r^xz + v_r^x o M_r^yz.

    Log-density is the sum of the density components; the feature is a matrix times the colour components.

    Args:
        resolution: values along each side (paper: 128 to 640).
        density_rank: components of each of the three kinds for density (paper: 16).
        colour_rank: the same for colour (paper: 48).
        head: width of the second block's hidden layer (paper: 128).
        start: log-density where all components are 0.
        bound: half the side of the cube.
    """

    table_rate: ClassVar[float] = 2.0

    def __init__(
        self,
        resolution: int = 32,
        density_rank: int = 4,
        colour_rank: int = 8,
        head: int = 32,
        start: float = -2.0,
        bound: float = 1.0,
    ) -> None:
        super().__init__(bound)
        positive("field-vm", resolution=resolution, density_rank=density_rank, colour_rank=colour_rank, head=head)
        self.start = float(start)

        def values(rank: int, *sides: int) -> nn.Parameter:
            return nn.Parameter(0.1 * torch.randn(3, rank, *sides))

        self.density_planes, self.density_lines = values(density_rank, resolution, resolution), values(density_rank, resolution, 1)
        self.colour_planes, self.colour_lines = values(colour_rank, resolution, resolution), values(colour_rank, resolution, 1)
        self.basis = nn.Linear(3 * colour_rank, GEO, bias=False)
        self.colour_head = ColourHead(head)

    def _components(self, planes: Tensor, lines: Tensor, x: Tensor) -> Tensor:
        """`(P, 3, rank)` products of plane and line values."""
        x = x / self.bound
        flat = torch.stack([x[:, list(axes)] for axes in PLANES])[:, :, None]  # (3, P, 1, 2)
        along = torch.stack([x[:, axis] for axis in LINES])
        along = torch.stack([torch.zeros_like(along), along], -1)[:, :, None]
        options = {"align_corners": True, "padding_mode": "border"}
        wide, long = F.grid_sample(planes, flat, **options), F.grid_sample(lines, along, **options)  # (3, rank, P, 1)
        return (wide * long)[..., 0].permute(2, 0, 1)

    def raw_geometry(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_density = self.start + self._components(self.density_planes, self.density_lines, x).sum((1, 2))
        feature = self.basis(self._components(self.colour_planes, self.colour_lines, x).flatten(1))
        return log_density, feature.clamp(*CLIP)

    def shade(self, x: Tensor, directions: Tensor, feature: Tensor | None) -> Tensor:
        assert feature is not None
        return self.colour_head(directions, feature)

    def tables(self) -> list[nn.Parameter]:
        return [self.density_planes, self.density_lines, self.colour_planes, self.colour_lines]

    def penalty(self) -> Tensor:
        """Mean absolute value of the density factors (paper, eq. 14): empty space becomes empty."""
        return self.density_planes.abs().mean() + self.density_lines.abs().mean()
