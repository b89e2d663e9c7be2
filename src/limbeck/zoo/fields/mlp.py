"""A field that is one network of the place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.zoo.fields.field import GEO, ColourHead, Field
from limbeck.zoo.network import positive


class MLPField(Field):
    """A radiance field as a network of the place's sines and cosines (NeRF, arXiv:2003.08934, section 5.1).

    Args:
        width, depth: hidden layers of the first block (paper: 256 and 8).
        frequencies: of the encoding, pi 2^0 to pi 2^(n-1) of the place in units of the bound (paper: 10).
        head: width of the second block's hidden layer (paper: 128).
        bound: half the side of the cube.
    """

    def __init__(self, width: int = 64, depth: int = 4, frequencies: int = 6, head: int = 32, bound: float = 1.0) -> None:
        super().__init__(bound)
        positive("field-mlp", width=width, depth=depth, frequencies=frequencies, head=head)
        layers: list[nn.Module] = []
        size = 3 + 6 * frequencies
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.trunk = nn.Sequential(*layers, nn.Linear(size, 1 + GEO))
        self.colour_head = ColourHead(head)
        self.register_buffer("scales", math.pi * 2.0 ** torch.arange(frequencies), persistent=False)

    def raw_geometry(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x / self.bound
        waves = (x[:, :, None] * self.scales).flatten(1)  # type: ignore[operator]
        found = self.trunk(torch.cat([x, waves.sin(), waves.cos()], -1))
        return found[:, 0], found[:, 1:]

    def shade(self, x: Tensor, directions: Tensor, feature: Tensor | None) -> Tensor:
        assert feature is not None
        return self.colour_head(directions, feature)
