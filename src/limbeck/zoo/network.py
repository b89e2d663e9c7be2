"""The shape that every embedded network has: stem, stages, pooled embedding, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError


class MeanPool(nn.Module):
    """`(B, C, H, W)` to `(B, C)` by the mean over places."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class TokenPool(nn.Module):
    """`(B, L, D)` to `(B, D)` by the mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Network(nn.Module):
    """A classifier made of `stem`, `stages` (one submodule a stage), `pool` (gives the embedding `(B, D)`) and `head`.

    Attributes:
        limbeck_config: `{"ref", "args"}` by which `limbeck.zoo.build` makes it again; set by `build`.
        plain_start: first weights are what each layer's `reset_parameters` draws, so that a network can be drawn again in place.
    """

    limbeck_config: dict[str, Any]
    plain_start: bool = False

    def __init__(self, stem: nn.Module, stages: list[nn.Module], pool: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise UserError(f"a network for {classes} classes", "give at least 1")
        self.stem, self.stages, self.pool = stem, nn.Sequential(*stages), pool
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, classes)`."""
        return self.head(self.pool(self.stages(self.stem(x))))


def pictures(input_shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """`(C, H, W)` of a network that needs pictures.

    Raises:
        UserError: the samples have another shape.
    """
    if len(input_shape) != 3:
        raise UserError(f"network {name!r} needs pictures (C, H, W), but the samples have shape {tuple(input_shape)}", "use mlp or linear")
    channels, height, width = input_shape
    return channels, height, width


def positive(name: str, **sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        UserError: naming the network and the argument.
    """
    for argument, value in sizes.items():
        if value < 1:
            raise UserError(f"network {name!r}: {argument} is {value}", "give at least 1")


class Patches(nn.Module):
    """`(B, C, H, W)` to tokens `(B, L, D)`: one for each square of `patch` pixels, L = (H / patch) * (W / patch).

    Raises:
        UserError: the squares do not tile the picture.
    """

    def __init__(self, input_shape: tuple[int, ...], patch: int, dim: int, name: str, positions: bool) -> None:
        super().__init__()
        channels, height, width = pictures(input_shape, name)
        positive(name, patch=patch, dim=dim)
        if height % patch or width % patch:
            raise UserError(f"network {name!r}: squares of {patch} pixels do not tile {height} x {width}", "give a patch that divides both")
        self.length = (height // patch) * (width // patch)
        self.project = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.randn(self.length, dim) * 0.02) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x).flatten(2).transpose(1, 2)
        return tokens if self.positions is None else tokens + self.positions
