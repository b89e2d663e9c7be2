"""What every radiance field offers, and the second block that most of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.rendering.density import clamp_inward
from limbeck.zoo.fields.harmonics import spherical_harmonics
from limbeck.zoo.network import positive

GEO = 15
"""Width of the feature of a place, as in Instant-NGP and Progressive Volume Distillation."""

CLIP = (-7.0, 7.0)
"""Where log-density is kept. The released code of arXiv:2211.15977 has -2 for the lower end and leaves out empty space by an occupancy
grid; without one, exp(-2) would be a fog."""


@dataclass
class FieldOutput:
    """What a field says of P points.

    Attributes:
        log_density: `(P,)`, in range; density is its exponential, per unit of length.
        feature: `(P, 15)` of the place; None for fields without a second block.
        colour: `(P, 3)` in [0, 1]; None where only the first block was asked.
    """

    log_density: Tensor
    feature: Tensor | None
    colour: Tensor | None = None

    @property
    def block(self) -> Tensor:
        """`(P, 16)`: log-density and feature, what the first block gives."""
        assert self.feature is not None
        return torch.cat([self.log_density[:, None], self.feature], -1)


class Field(nn.Module):
    """A radiance field inside the cube [-bound, bound]^3. A subclass gives `geometry` and `shade`.

    Class attributes:
        stands_alone: its own arguments say everything; it needs no shape and no classes of the data.
        has_feature: whether there is a feature of the place.
        table_rate: by how much values at places (`tables`) learn faster than networks.

    Args:
        bound: half the side of the cube.
    """

    stands_alone: ClassVar[bool] = True
    has_feature: ClassVar[bool] = True
    table_rate: ClassVar[float] = 1.0
    limbeck_config: dict[str, Any]

    def __init__(self, bound: float) -> None:
        super().__init__()
        if not bound > 0:
            raise UserError(f"a field of bound {bound}", "give half the side of the cube, a number above 0")
        self.bound = float(bound)

    def raw_geometry(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-density `(P,)` before it is kept in range, and the feature, of places `(P, 3)` in the cube."""
        raise NotImplementedError

    def shade(self, x: Tensor, directions: Tensor, feature: Tensor | None) -> Tensor:
        """Colours `(P, 3)` in [0, 1] of places seen along unit `directions` `(P, 3)`."""
        raise NotImplementedError

    def geometry(self, x: Tensor) -> FieldOutput:
        """The first block alone."""
        log_density, feature = self.raw_geometry(x)
        return FieldOutput(clamp_inward(log_density, *CLIP), feature)

    def forward(self, x: Tensor, directions: Tensor) -> FieldOutput:
        """Both blocks: places and directions `(P, 3)`."""
        found = self.geometry(x)
        found.colour = self.shade(x, directions, found.feature)
        return found

    def tables(self) -> list[nn.Parameter]:
        """Parameters that are values at places (grids, tables, factors); they learn `table_rate` times as fast."""
        return []

    def penalty(self) -> Tensor | None:
        """What is kept small while it learns: the mean size of density factors; None for most."""
        return None


class ColourHead(nn.Module):
    """The second block: colour = sigmoid(MLP(harmonics of the direction (16), feature (15))).

    Args:
        width: of its hidden layers. depth: their number.
    """

    def __init__(self, width: int = 32, depth: int = 1) -> None:
        super().__init__()
        positive("colour head", width=width, depth=depth)
        layers: list[nn.Module] = []
        size = 16 + GEO
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, 3))

    def forward(self, directions: Tensor, feature: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(torch.cat([spherical_harmonics(directions), feature], -1)))
