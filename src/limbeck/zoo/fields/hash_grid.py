"""A field that is a pyramid of tables, read through a hash."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.errors import UserError
from limbeck.zoo.fields.field import GEO, ColourHead, Field
from limbeck.zoo.network import positive

PRIMES = (1, 2654435761, 805459861)
"""Of the spatial hash (paper, eq. 4)."""

WRAPPED = tuple(prime - 2**32 if prime >= 2**31 else prime for prime in PRIMES)
"""The same as signed 32-bit numbers: products keep their low bits."""


CORNERS = tuple((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1))
"""Of a cell: 0 for its lower end along x, y, z, 1 for its upper."""


class HashEncoding(nn.Module):
    """Multiresolution hash encoding (Instant-NGP, arXiv:2201.05989, section 3).

    A level whose grid fits into the table is stored densely; larger ones are read at h(corner) = xor_i(corner_i prime_i) mod table size.

    Args:
        levels: of the pyramid. features: values at each corner. table: entries of a level, a power of two.
        coarsest, finest: cells along the side on the first and the last level; those between grow geometrically.
    """

    def __init__(self, levels: int, features: int, table: int, coarsest: int, finest: int) -> None:
        super().__init__()
        positive("field-hash", levels=levels, features=features, table=table, coarsest=coarsest, finest=finest)
        if table & (table - 1):
            raise UserError(f"network 'field-hash': table is {table}", "give a power of two")
        if finest < coarsest:
            raise UserError(f"network 'field-hash': finest is {finest}, coarsest {coarsest}", "give finest >= coarsest")
        growth = (finest / coarsest) ** (1 / max(1, levels - 1))
        cells = torch.tensor([int(coarsest * growth**level + 1e-6) for level in range(levels)], dtype=torch.int32)
        self.width, self.table = levels * features, table
        self.values = nn.Parameter(torch.empty(levels * table, features).uniform_(-1e-4, 1e-4))
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("dense", (cells.long() + 1) ** 3 <= table, persistent=False)
        self.register_buffer("first", table * torch.arange(levels, dtype=torch.int32), persistent=False)

    def places(self, low: Tensor) -> Tensor:
        """Entries `(8, L, P)` of the corners of cells in all levels' tables.

        Args:
            low: `(3, L, P)` int32, the least corner of each cell. Points come last, so that the arithmetic runs over long rows.
        """
        side, dense = (self.cells + 1)[:, None], self.dense[:, None]  # type: ignore[operator, index]
        spread = (torch.ones_like(side), side, side * side)
        # each axis gives its own summand (dense) or factor (hashed); those of the eight corners are combined
        factors = [torch.where(dense, spread[axis], WRAPPED[axis]).to(torch.int32) for axis in range(3)]
        ends = [(low[axis] * factors[axis], (low[axis] + 1) * factors[axis]) for axis in range(3)]
        found = []
        for a, b, c in CORNERS:
            x, y, z = ends[0][a], ends[1][b], ends[2][c]
            found.append(torch.where(dense, x + y + z, (x ^ y ^ z) & (self.table - 1)))
        return torch.stack(found) + self.first[:, None]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """`(P, levels * features)` of places `(P, 3)` in [0, 1]^3."""
        cells = self.cells[:, None].to(x.dtype)  # type: ignore[index]
        scaled = x.T.contiguous()[:, None] * cells
        floor = torch.minimum(scaled.floor(), cells - 1).clamp_min(0)
        inside = scaled - floor
        shares = (1 - inside, inside)
        weights = torch.stack([shares[a][0] * shares[b][1] * shares[c][2] for a, b, c in CORNERS])
        read = F.embedding(self.places(floor.to(torch.int32)), self.values)  # (8, L, P, features)
        return torch.einsum("clp,clpf->plf", weights, read).flatten(1)


class HashField(Field):
    """A radiance field as a multiresolution hash grid with a small network on it (Instant-NGP, arXiv:2201.05989).

    Args:
        levels, features, table, coarsest, finest: see `HashEncoding` (paper: 16, 2, 2^19, 16, 2048).
        width: of the first block's hidden layer (paper: 64).
        head: width of the second block's hidden layer (paper: 64, two of them).
        bound: half the side of the cube.
    """

    def __init__(
        self,
        levels: int = 6,
        features: int = 2,
        table: int = 4096,
        coarsest: int = 4,
        finest: int = 48,
        width: int = 32,
        head: int = 32,
        bound: float = 1.0,
    ) -> None:
        super().__init__(bound)
        positive("field-hash", width=width, head=head)
        self.encoding = HashEncoding(levels, features, table, coarsest, finest)
        self.trunk = nn.Sequential(nn.Linear(self.encoding.width, width), nn.ReLU(), nn.Linear(width, 1 + GEO))
        self.colour_head = ColourHead(head)

    def raw_geometry(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.trunk(self.encoding((x / self.bound + 1) / 2))
        return found[:, 0], found[:, 1:]

    def shade(self, x: Tensor, directions: Tensor, feature: Tensor | None) -> Tensor:
        assert feature is not None
        return self.colour_head(directions, feature)

    def tables(self) -> list[nn.Parameter]:
        return [self.encoding.values]
