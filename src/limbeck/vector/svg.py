"""Drawings as SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from limbeck.errors import UserError


@dataclass
class Layer:
    """One fill of a picture.

    Attributes:
        chains: closed chains `(3 S, 2)` that are filled together (nonzero).
        colour: `(C,)` in [-1, 1], C 1 (grey) or 3. opacity: in [0, 1].
    """

    chains: list[Tensor]
    colour: Tensor
    opacity: float = 1.0


def hex_colour(colour: Tensor) -> str:
    """`#rrggbb` of a colour `(1,)` or `(3,)` in [-1, 1]."""
    if colour.numel() not in (1, 3):
        raise UserError(f"a colour of {colour.numel()} channels", "SVG knows grey and RGB: give data of 1 or 3 channels")
    levels = ((colour.detach().double().clamp(-1, 1) + 1) * 127.5).round().to(torch.int64).expand(3).tolist()
    return "#{:02x}{:02x}{:02x}".format(*levels)


def path_data(chain: Tensor, size: float) -> str:
    """The `d` of a closed chain `(3 S, 2)`: from the square [-1, 1] (y upwards) to pixels (y downwards)."""
    points = chain.detach().double().cpu()
    if not bool(torch.isfinite(points).all()):
        raise UserError("a path holds numbers that are not finite", "the optimisation ran away: lower the learning rate")
    x, y = (points[:, 0] + 1) * size / 2, (1 - points[:, 1]) * size / 2
    at = [f"{a:.3f} {b:.3f}" for a, b in zip(x.tolist(), y.tolist())]
    at.append(at[0])
    curves = " ".join(f"C {at[i + 1]} {at[i + 2]} {at[i + 3]}" for i in range(0, len(points), 3))
    return f"M {at[0]} {curves} Z"


def to_svg(layers: Sequence[Layer], size: float, background: Tensor | None = None, title: str = "") -> str:
    """A whole SVG document; the first layer is the lowest.

    Args:
        size: width and height of the view box. background: `(C,)` colour, None for none. title: told to readers; any characters.
    """
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size:g} {size:g}" width="{16 * size:g}" height="{16 * size:g}">',
    ]
    if title:
        clean = "".join(c for c in title if c in "\t\n" or ord(c) >= 32)
        lines.append(f"  <title>{escape(clean)}</title>")
    if background is not None:
        lines.append(f'  <rect width="100%" height="100%" fill="{hex_colour(background)}"/>')
    for layer in layers:
        data = " ".join(path_data(chain, size) for chain in layer.chains)
        opacity = "" if layer.opacity >= 0.999 else f' fill-opacity="{layer.opacity:.3f}"'
        lines.append(f'  <path d="{data}" fill="{hex_colour(layer.colour)}"{opacity}/>')
    return "\n".join([*lines, "</svg>", ""])
