"""Real spherical harmonics of a direction: how colour may depend on where it is seen from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.errors import UserError

DEGREES = 4
"""The most bands: 16 functions."""


def spherical_harmonics(directions: Tensor, bands: int = 4) -> Tensor:
    """`(P, bands^2)` orthonormal real spherical harmonics of unit vectors `(P, 3)`, band by band, within a band from m = -l to l.

    Args:
        bands: 1 to 4.

    Raises:
        UserError: another number of bands.

    >>> spherical_harmonics(torch.tensor([[0.0, 0.0, 1.0]]), 2).shape
    torch.Size([1, 4])
    """
    if not 1 <= bands <= DEGREES:
        raise UserError(f"{bands} bands of spherical harmonics", f"ask for 1 to {DEGREES}")
    x, y, z = directions.unbind(-1)
    root = math.sqrt
    found = [torch.full_like(x, 0.5 * root(1 / math.pi))]
    if bands > 1:
        a = root(3 / (4 * math.pi))
        found += [a * y, a * z, a * x]
    if bands > 2:
        a = 0.5 * root(15 / math.pi)
        found += [a * x * y, a * y * z, 0.25 * root(5 / math.pi) * (3 * z**2 - 1), a * x * z, 0.5 * a * (x**2 - y**2)]
    if bands > 3:
        a, b, c = 0.25 * root(35 / (2 * math.pi)), 0.5 * root(105 / math.pi), 0.25 * root(21 / (2 * math.pi))
        found += [
            a * y * (3 * x**2 - y**2),
            b * x * y * z,
            c * y * (5 * z**2 - 1),
            0.25 * root(7 / math.pi) * (5 * z**3 - 3 * z),
            c * x * (5 * z**2 - 1),
            0.5 * b * z * (x**2 - y**2),
            a * x * (x**2 - 3 * y**2),
        ]
    return torch.stack(found, -1)
