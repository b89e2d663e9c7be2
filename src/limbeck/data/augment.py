"""Random changes of pictures, a whole batch at a time, each sample with its own draw.

Random numbers come from torch's global generator alone, which a checkpoint restores: a resumed run sees the same pictures.
Shapes: `(B, C, H, W)` floats in and out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError, unknown


def _warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Sample `x` through one affine map for each sample; outside is 0. `matrix`: `(B, 2, 3)` in the unit square's coordinates."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def shift(x: Tensor, amount: float) -> Tensor:
    """Move each picture by up to `amount` whole pixels in each direction; 0 comes in."""
    most = int(amount)
    height, width = x.shape[-2:]
    padded = F.pad(x, [most] * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, len(x), 1), device=x.device)
    rows = (torch.arange(height, device=x.device) + down)[:, None, :, None]
    columns = (torch.arange(width, device=x.device) + right)[:, None, None, :]
    sample = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[sample, channel, rows, columns]


def flip(x: Tensor, amount: float) -> Tensor:
    """Mirror left and right with probability `amount`."""
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < amount
    return torch.where(chosen, x.flip(-1), x)


def noise(x: Tensor, amount: float) -> Tensor:
    """Add normal noise of standard deviation `amount`."""
    return x + amount * torch.randn_like(x)


def rotate(x: Tensor, amount: float) -> Tensor:
    """Turn each picture by up to `amount` degrees either way."""
    angle = (torch.rand(len(x), device=x.device) * 2 - 1) * math.radians(amount)
    ratio = x.shape[-2] / x.shape[-1]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    return _warp(x, matrix.to(x.dtype))


def scale(x: Tensor, amount: float) -> Tensor:
    """Enlarge or shrink each picture by a factor of up to `1 + amount`."""
    factor = (1 + amount) ** (torch.rand(len(x), device=x.device) * 2 - 1)
    zero = torch.zeros_like(factor)
    return _warp(x, torch.stack([1 / factor, zero, zero, zero, 1 / factor, zero], 1).view(-1, 2, 3).to(x.dtype))


def cutout(x: Tensor, amount: float) -> Tensor:
    """Set a square of `amount` pixels, anywhere over the picture, to 0."""
    side, (height, width) = int(amount), x.shape[-2:]
    top = torch.randint(0, height, (len(x), 1), device=x.device) - side // 2
    left = torch.randint(0, width, (len(x), 1), device=x.device) - side // 2
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    hole = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[:, None, :]
    return x.masked_fill(hole[:, None], 0)


def brightness(x: Tensor, amount: float) -> Tensor:
    """Multiply each picture by a factor between `1 - amount` and `1 + amount`."""
    return x * (1 + amount * (torch.rand(len(x), 1, 1, 1, device=x.device) * 2 - 1))


STEPS: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "shift": (shift, 1),
    "flip": (flip, 0.5),
    "noise": (noise, 0.05),
    "rotate": (rotate, 10),
    "scale": (scale, 0.1),
    "cutout": (cutout, 3),
    "brightness": (brightness, 0.2),
}
"""Each step with the amount it has when none is given."""


class Augment:
    """Several random changes, one after the other.

    Args:
        steps: each "name", "name:amount" or {"name": amount}, such as ["shift:1", "flip", "noise:0.05"].

    Raises:
        UserError: an unknown step, or an amount that is no number or negative.

    Called with `(B, C, H, W)` it returns the same shape; in a dict of inputs it changes `pixel_values` only.
    """

    def __init__(self, steps: Sequence[str | Mapping[str, float]]) -> None:
        if isinstance(steps, str):
            steps = [steps]
        self.steps: list[tuple[str, float]] = []
        for step in steps:
            pairs = list(step.items()) if isinstance(step, Mapping) else [tuple(str(step).partition(":")[::2])]
            for name, given in pairs:
                if name not in STEPS:
                    raise unknown("augmentation", name, STEPS)
                try:
                    value = STEPS[name][1] if given in ("", None) else float(given)
                except (TypeError, ValueError):
                    value = -1.0
                if not 0 <= value < math.inf:
                    raise UserError(f"augmentation {name!r} has the amount {given!r}", f"give a number, such as {name}:{STEPS[name][1]}")
                self.steps.append((name, value))

    def __call__(self, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            return {**inputs, "pixel_values": self(inputs["pixel_values"])} if "pixel_values" in inputs else inputs
        if inputs.ndim != 4:
            raise UserError(f"augmentation needs pictures (B, C, H, W), but the inputs have shape {tuple(inputs.shape)}", "leave it out")
        for name, value in self.steps:
            if value:
                inputs = STEPS[name][0](inputs, value)
        return inputs

    def describe(self) -> list[str]:
        """The steps as strings that make the same object."""
        return [f"{name}:{value:g}" for name, value in self.steps]
