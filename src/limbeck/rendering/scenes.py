"""Scenes that are always there: solids with scikit-learn's photographs on them, pictured exactly from cameras around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.shapes import Box, Letter, Solid, Sphere, letter_outlines, photograph, trace

FINE = 3
"""Rays along each side of a pixel: nine are averaged."""


def globes() -> list[Solid]:
    """Two balls with a photograph round each; one of them shines."""
    return [
        Sphere(photograph("china.jpg"), middle=(-0.32, -0.1, -0.1), radius=0.5, turn=(40, 10)),
        Sphere(photograph("flower.jpg"), middle=(0.45, 0.25, 0.2), radius=0.36, gloss=0.4),
    ]


def still_life() -> list[Solid]:
    """A ball, a turned box and a slab under them."""
    return [
        Sphere(photograph("flower.jpg"), middle=(0.35, -0.25, 0.0), radius=0.34, gloss=0.4),
        Box(photograph("china.jpg"), middle=(-0.35, 0.2, -0.02), half=(0.28, 0.3, 0.32), turn=(30, 0)),
        Box(None, (0.75, 0.7, 0.55), middle=(0.0, 0.0, -0.44), half=(0.75, 0.65, 0.1)),
    ]


def letter(character: str = "R") -> list[Solid]:
    """A letter of DejaVu Sans Bold, extruded, with a photograph on it."""
    return [Letter(photograph("china.jpg"), outlines=letter_outlines(character), thick=0.25, turn=(20, 0), gloss=0.2)]


SCENES: dict[str, Callable[..., list[Solid]]] = {"globes": globes, "still-life": still_life, "letter": letter}
"""Embedded scenes by name, all inside the cube [-1, 1]^3."""


def pictures_of(solids: Sequence[Solid], cameras: Cameras, fine: int = FINE) -> tuple[Tensor, Tensor]:
    """Exact pictures: colours times opacity `(N, 3, H, W)`, and opacity `(N, 1, H, W)`, each pixel the mean of `fine` x `fine` rays."""
    colours, opacities = [], []
    shape = (cameras.height, cameras.width, fine * fine)
    for number in range(len(cameras)):
        colour, hit, _ = trace(solids, *cameras.all_rays(number, fine))
        colours.append(colour.view(*shape, 3).mean(2).permute(2, 0, 1))
        opacities.append(hit.view(shape).mean(2)[None])
    return torch.stack(colours), torch.stack(opacities)


def cameras_for(count: int, size: int, seed: int, part: int) -> Cameras:
    """Cameras around an embedded scene; each part (0 training, 1 validation, 2 test) has random ones of its own."""
    if not 4 <= size <= 1024:
        raise UserError(f"pictures of {size} pixels", "give data.size of 4 to 1024")
    return orbit(count, size, generator=torch.Generator().manual_seed(1_000_003 * seed + part))


def listing() -> list[dict[str, object]]:
    """One row for each embedded scene, for `limbeck data`."""
    return [{"name": f"scene:{name}", "source": (make.__doc__ or "").splitlines()[0], "available": True} for name, make in SCENES.items()]
