"""Fewer layers that show the same: drop what nobody sees, give near colours one colour, fill neighbours of one colour together."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.vector.bezier import reverse, signed_area
from limbeck.vector.drawing import Drawing
from limbeck.vector.svg import Layer

LEAST_AREA = 0.005
"""Layers that cover less than this share of the square are dropped."""

LEAST_OPACITY = 0.1
"""Layers fainter than this are dropped."""


@torch.no_grad()
def seen(drawing: Drawing, size: int | None = None) -> Tensor:
    """`(V, n)` the share of the square that each layer gives to the picture: its mask where no later layer lies over it."""
    masks = drawing.masks(torch.arange(drawing.variants, device=drawing.colour.device), size)
    over = (1 - masks).flip(1).cumprod(1).flip(1)
    above = torch.cat([over[:, 1:], torch.ones_like(over[:, :1])], 1)
    return (masks * above).mean((-2, -1))


@torch.no_grad()
def worth_keeping(drawing: Drawing, area: float = LEAST_AREA, opacity: float = LEAST_OPACITY) -> Tensor:
    """`(V, n)` 1 for layers that are big and strong enough to be seen, 0 for the others; the most visible one of a drawing always stays."""
    visible = seen(drawing)
    keep = (visible >= area) & (drawing.opacities() >= opacity)
    best = torch.nn.functional.one_hot(visible.argmax(1), visible.shape[1]).bool()
    return (keep | best).to(drawing.kept)


@torch.no_grad()
def layers_of(drawing: Drawing, variant: int = 0, near: float = 0.1) -> list[Layer]:
    """The kept layers of one drawing, bottom to top.

    Neighbouring opaque layers whose colours differ by less than `near` (in units of the range 2, greatest channel) are filled as one path
    in their mean colour; all of their chains run counter-clockwise, so that the nonzero rule fills their union.
    """
    chains, colours = drawing.chains()[variant].cpu(), drawing.colours()[variant].cpu()
    opacities = drawing.opacities()[variant].cpu()
    found: list[tuple[Layer, list[Tensor]]] = []
    for chain, colour, opacity, kept in zip(chains, colours, opacities.tolist(), drawing.kept[variant].tolist()):
        if not kept:
            continue
        chain = chain if float(signed_area(chain)) >= 0 else reverse(chain)
        before = found[-1][0] if found else None
        if before is not None and min(opacity, before.opacity) >= 0.9 and float((before.colour - colour).abs().max()) < 2 * near:
            before.chains.append(chain)
            found[-1][1].append(colour)
            before.colour, before.opacity = torch.stack(found[-1][1]).mean(0), max(opacity, before.opacity)
            continue
        found.append((Layer([chain], colour, opacity), [colour]))
    return [layer for layer, _ in found]
