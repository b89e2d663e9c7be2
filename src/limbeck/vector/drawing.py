"""Drawings as modules: closed paths in layers with colours, rendered to pictures with gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.vector.raster import coverage


def composite(masks: Tensor, colours: Tensor, background: Tensor) -> Tensor:
    """Layers over a background, the last one on top: I = b prod_i (1 - m_i) + sum_i c_i m_i prod_{j > i} (1 - m_j).

    Args:
        masks: `(..., n, H, W)` in [0, 1]. colours: `(..., n, C)`. background: `(C,)`.

    Returns:
        `(..., C, H, W)`.
    """
    picture = background[:, None, None].expand(*masks.shape[:-3], -1, *masks.shape[-2:])
    for layer in range(masks.shape[-3]):
        mask = masks[..., layer, None, :, :]
        picture = picture * (1 - mask) + colours[..., layer, :, None, None] * mask
    return picture


class Drawing(nn.Module):
    """`variants` drawings of closed paths; this class says how paths become pictures, a subclass what the paths are.

    Args:
        input_shape: `(C, H, H)` of the pictures.
        variants: drawings (particles) side by side.
        paths: layers of each.
        segments: cubic segments of each path.
        background: colour under all layers, in [-1, 1].
        softness: of edges, in units of the square's half side; None: a quarter of a pixel.

    Attributes:
        colour: `(V, n, C)`, a colour in (-1, 1) through tanh. strength: `(V, n)`, an opacity through the sigmoid.
        kept: `(V, n)` 1 for the layers that are left after cleaning.

    Raises:
        UserError: pictures that are not square, or sizes below 1.
    """

    def __init__(
        self, input_shape: tuple[int, ...], variants: int, paths: int, segments: int, background: float, softness: float | None
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or input_shape[1] != input_shape[2]:
            raise UserError(f"a drawing on pictures of shape {tuple(input_shape)}", "give square pictures (C, H, H), see data.size")
        if min(variants, paths) < 1 or segments < 2:
            raise UserError(f"{variants} drawings of {paths} paths of {segments} segments", "give at least 1, 1 and 2")
        if not -1 <= background <= 1:
            raise UserError(f"a drawing's background is {background}", "give a grey value from -1 (black) to 1 (white)")
        self.input_shape, self.variants, self.paths, self.count = tuple(input_shape), variants, paths, segments
        self.background, self.softness = background, softness
        self.colour = nn.Parameter(torch.empty(variants, paths, input_shape[0]))
        self.strength = nn.Parameter(torch.empty(variants, paths))
        self.register_buffer("kept", torch.ones(variants, paths))
        ink = 1.0 if background <= 0 else -1.0  # begin with a contrast, or no edge has a gradient
        nn.init.normal_(self.colour, ink, 0.2)
        nn.init.constant_(self.strength, 2.0)

    def chains(self, pick: Tensor | None = None) -> Tensor:
        """Closed chains `(B, n, 3 S, 2)` on the square of the drawings `pick` `(B,)`; of all when it is left out."""
        raise NotImplementedError

    def colours(self) -> Tensor:
        """`(V, n, C)` in (-1, 1)."""
        return self.colour.tanh()

    def opacities(self) -> Tensor:
        """`(V, n)` in [0, 1); 0 for layers that were dropped."""
        return self.strength.sigmoid() * self.kept

    def masks(self, pick: Tensor, size: int | None = None) -> Tensor:
        """`(B, n, size, size)`: how much of each pixel each layer takes."""
        size = self.input_shape[1] if size is None else size
        return coverage(self.chains(pick), size, self.softness) * self.opacities()[pick][..., None, None]

    def render(self, pick: Tensor, size: int | None = None) -> Tensor:
        """`(B, C, size, size)` in [-1, 1]: the pictures of the drawings `pick` `(B,)`; size is that of the data by default."""
        background = torch.full((self.input_shape[0],), self.background, device=self.colour.device, dtype=self.colour.dtype)
        return composite(self.masks(pick, size), self.colours()[pick], background)

    def forward(self, pick: Tensor) -> Tensor:
        """As `render`."""
        return self.render(pick)


class DirectDrawing(Drawing):
    """Drawings whose control points are optimised themselves. Each path begins as a circle somewhere on the square.

    Args:
        see `Drawing`; radius: of the first circles, in units of the square's half side, each between half and all of it.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int = 0,
        variants: int = 1,
        paths: int = 6,
        segments: int = 8,
        background: float = -1.0,
        softness: float | None = None,
        radius: float = 0.5,
    ) -> None:
        super().__init__(input_shape, variants, paths, segments, background, softness)
        centre = 1.0 * (torch.rand(variants, paths, 1, 2) - 0.5)
        size = radius * (0.5 + 0.5 * torch.rand(variants, paths, 1, 1))
        self.points = nn.Parameter(centre + size * circle(segments))

    def chains(self, pick: Tensor | None = None) -> Tensor:
        return self.points if pick is None else self.points[pick]


def circle(count: int) -> Tensor:
    """The unit circle as a closed chain `(3 count, 2)`, counter-clockwise from the bottom; each arc's handle is 4/3 tan(angle / 4)."""
    step = 2 * math.pi / count
    handle = 4 / 3 * math.tan(step / 4)
    angle = -math.pi / 2 + step * torch.arange(count)
    anchor = torch.stack([angle.cos(), angle.sin()], -1)
    along = torch.stack([-angle.sin(), angle.cos()], -1)
    following, ahead = anchor.roll(-1, 0), along.roll(-1, 0)
    return torch.stack([anchor, anchor + handle * along, following - handle * ahead], 1).flatten(0, 1)
