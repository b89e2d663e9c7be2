"""A field that is a dense grid of values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.zoo.fields.field import Field
from limbeck.zoo.fields.harmonics import spherical_harmonics
from limbeck.zoo.network import positive


class VoxelField(Field):
    """A radiance field as a grid of log-densities and spherical harmonics, read by trilinear interpolation (Plenoxels, arXiv:2112.05131).

    There is no network and no feature: colour = sigmoid(sum over the harmonics' coefficients).

    Args:
        resolution: grid points along each side (paper: up to 512, sparse).
        bands: of the harmonics, 1 to 4 (paper: 3).
        start: log-density everywhere before training.
        bound: half the side of the cube; the outermost grid points lie on it.
    """

    has_feature: ClassVar[bool] = False
    table_rate: ClassVar[float] = 10.0

    def __init__(self, resolution: int = 32, bands: int = 2, start: float = -2.0, bound: float = 1.0) -> None:
        super().__init__(bound)
        positive("field-voxels", resolution=resolution, bands=bands)
        spherical_harmonics(torch.zeros(1, 3), bands)  # refuses too many bands
        self.bands = bands
        self.density = nn.Parameter(torch.full((1, 1, *3 * (resolution,)), float(start)))
        self.harmonics = nn.Parameter(torch.zeros(1, 3 * bands**2, *3 * (resolution,)))

    def _read(self, grid: Tensor, x: Tensor) -> Tensor:
        """`(P, C)` values of a grid at places; its last axis runs along x."""
        place = (x / self.bound)[None, :, None, None]
        return F.grid_sample(grid, place, align_corners=True, padding_mode="border")[0, :, :, 0, 0].T

    def raw_geometry(self, x: Tensor) -> tuple[Tensor, None]:
        return self._read(self.density, x)[:, 0], None

    def shade(self, x: Tensor, directions: Tensor, feature: Tensor | None) -> Tensor:
        values = self._read(self.harmonics, x).view(len(x), 3, -1)
        return torch.sigmoid((values * spherical_harmonics(directions, self.bands)[:, None]).sum(-1))

    def tables(self) -> list[nn.Parameter]:
        return [self.density, self.harmonics]
