"""Differentiable siamese augmentation (Zhao & Bilen 2021, arXiv:2102.08259): one random change, the same for real and synthetic samples.

Random numbers come from torch's global generator. Shapes: `(B, C, H, W)`; changes are differentiable in the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError, unknown

COLOURS = ("brightness", "saturation", "contrast")
"""What "color" does, in this order."""


@dataclass(frozen=True)
class Draw:
    """One drawn change: the operation and its numbers, the same for every sample it is applied to."""

    operation: str
    numbers: tuple[float, ...]


def _brightness(x: Tensor, u: float) -> Tensor:
    return x + (u - 0.5)


def _saturation(x: Tensor, u: float) -> Tensor:
    mean = x.mean(1, keepdim=True)
    return (x - mean) * (2 * u) + mean


def _contrast(x: Tensor, u: float) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (u + 0.5) + mean


def _color(x: Tensor, brightness: float, saturation: float, contrast: float) -> Tensor:
    return _contrast(_saturation(_brightness(x, brightness), saturation), contrast)


def _moved(x: Tensor, down: int, right: int) -> Tensor:
    """`out[h, w] = x[h + down, w + right]`, zeros from outside."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (abs(right), abs(right), abs(down), abs(down)))
    return padded[..., abs(down) + down : abs(down) + down + height, abs(right) + right : abs(right) + right + width]


def _crop(x: Tensor, down: float, right: float) -> Tensor:
    """Shift by up to an eighth of the side; u in [0, 1) becomes a whole number of pixels."""
    moves = []
    for u, side in zip((down, right), x.shape[-2:]):
        most = int(0.125 * side + 0.5)
        moves.append(min(int(u * (2 * most + 1)), 2 * most) - most)
    return _moved(x, *moves)


def _cutout(x: Tensor, row: float, column: float) -> Tensor:
    """A square of half the side, around a random centre, becomes 0; it is clipped at the border."""
    height, width = x.shape[-2:]
    mask = torch.ones(height, width, device=x.device, dtype=x.dtype)
    spans = []
    for u, side in ((row, height), (column, width)):
        hole = int(0.5 * side + 0.5)
        centre = int(u * (side + (1 - hole % 2)))
        spans.append(slice(max(0, centre - hole // 2), min(side, centre - hole // 2 + hole)))
    mask[spans[0], spans[1]] = 0
    return x * mask


def _flip(x: Tensor, u: float) -> Tensor:
    return x.flip(-1) if u < 0.5 else x


def _warp(x: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    matrix = torch.tensor(rows, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _scale(x: Tensor, across: float, down: float) -> Tensor:
    """Each axis by a factor of its own, uniform in [1 / 1.2, 1.2]."""
    sx, sy = (1 / 1.2 + u * (1.2 - 1 / 1.2) for u in (across, down))
    return _warp(x, [[sx, 0, 0], [0, sy, 0]])


def _rotate(x: Tensor, u: float) -> Tensor:
    """By up to 15 degrees either way."""
    angle = math.radians((u - 0.5) * 30)
    return _warp(x, [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])


def _each_crop(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    grids, known = [], []
    for u, side in zip((down, right), x.shape[-2:]):
        most = int(0.125 * side + 0.5)
        at = torch.arange(side, device=x.device) + (u.view(-1, 1) * (2 * most + 1)).long().clamp(max=2 * most) - most
        grids.append(at.clamp(0, side - 1))
        known.append((at >= 0) & (at < side))
    moved = x.gather(2, grids[0][:, None, :, None].expand(x.shape)).gather(3, grids[1][:, None, None, :].expand(x.shape))
    return moved * (known[0][:, None, :, None] & known[1][:, None, None, :])


def _each_cutout(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    inside = []
    for u, side in zip((row, column), x.shape[-2:]):
        hole = int(0.5 * side + 0.5)
        first = (u.view(-1, 1) * (side + (1 - hole % 2))).long() - hole // 2
        at = torch.arange(side, device=x.device)
        inside.append((at >= first) & (at < first + hole))
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def _each_warp(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The linear map ((a, b), (c, d)) of each sample's own, entries `(B, 1, 1, 1)`."""
    matrix = F.pad(torch.cat([a, b, c, d], 1).view(-1, 2, 2), (0, 1)).to(x.dtype)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _each_scale(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    sx, sy = (1 / 1.2 + u * (1.2 - 1 / 1.2) for u in (across, down))
    return _each_warp(x, sx, torch.zeros_like(sx), torch.zeros_like(sx), sy)


def _each_rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (u - 0.5) * math.radians(30)
    return _each_warp(x, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


EACH: dict[str, Callable[..., Tensor]] = {
    "crop": _each_crop,
    "cutout": _each_cutout,
    "flip": lambda x, u: torch.where(u < 0.5, x.flip(-1), x),
    "scale": _each_scale,
    "rotate": _each_rotate,
}
"""Operations with numbers `(B, 1, 1, 1)` of each sample's own; colours broadcast as they are."""

OPERATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "color": (_color, 3),
    "brightness": (_brightness, 1),
    "saturation": (_saturation, 1),
    "contrast": (_contrast, 1),
    "crop": (_crop, 2),
    "cutout": (_cutout, 2),
    "flip": (_flip, 1),
    "scale": (_scale, 2),
    "rotate": (_rotate, 1),
}
"""Each operation with how many uniform numbers it needs."""


class Siamese:
    """One operation of a strategy at a time, drawn once and applied to as many batches as should share it.

    Args:
        strategy: operations joined by "_", such as "color_crop_cutout_scale_rotate". "flip" is wrong for digits and letters.

    Raises:
        UserError: an unknown operation.
    """

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.operations = [name for name in strategy.split("_") if name]
        for name in self.operations:
            if name not in OPERATIONS:
                raise unknown("augmentation", name, OPERATIONS)
        if not self.operations:
            raise UserError("the siamese strategy is empty", "join operations with _, for example crop_scale_rotate")

    def draw(self) -> Draw:
        """One operation, uniformly, and its numbers."""
        name = self.operations[int(torch.randint(len(self.operations), ()))]
        return Draw(name, tuple(torch.rand(OPERATIONS[name][1]).tolist()))

    @staticmethod
    def apply(x: Tensor, draw: Draw) -> Tensor:
        """A drawn change of a batch."""
        return OPERATIONS[draw.operation][0](x, *draw.numbers)

    def pair(self, synthetic: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Both batches under the same new draw."""
        draw = self.draw()
        return self.apply(synthetic, draw), self.apply(real, draw)

    def __call__(self, x: Tensor) -> Tensor:
        """A batch under one new operation, with numbers of each sample's own: how networks are trained (Zhao & Bilen 2021)."""
        name = self.operations[int(torch.randint(len(self.operations), ()))]
        numbers = torch.rand(OPERATIONS[name][1], len(x), 1, 1, 1).to(device=x.device)
        return EACH.get(name, OPERATIONS[name][0])(x, *numbers)
