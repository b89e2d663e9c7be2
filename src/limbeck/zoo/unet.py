"""A small conditional U-Net (Ronneberger et al. 2015, arXiv:1505.04597; blocks of Dhariwal and Nichol 2021, arXiv:2105.05233)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.denoising import DenoisingNetwork, zeroed
from limbeck.zoo.network import pictures, positive
from limbeck.zoo.vit import Attention


class ResidualConvolutions(nn.Module):
    """`(B, C, h, w)` to `(B, C', h, w)`: twice GroupNorm-SiLU-convolution around a shortcut, the second norm scaled and shifted.

    Starts as its shortcut: the identity, or a 1 x 1 convolution where C and C' differ.

    Args:
        channels: C.
        wide: C'.
        dim: length of the condition.
        groups: of the norms; must divide C and C'.
    """

    def __init__(self, channels: int, wide: int, dim: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.convolution1 = nn.GroupNorm(groups, channels), nn.Conv2d(channels, wide, 3, padding=1)
        self.norm2, self.convolution2 = nn.GroupNorm(groups, wide, affine=False), zeroed(nn.Conv2d(wide, wide, 3, padding=1))
        self.modulate = zeroed(nn.Linear(dim, 2 * wide))
        self.activation = nn.SiLU()
        self.shortcut = nn.Identity() if channels == wide else nn.Conv2d(channels, wide, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` `(B, C, h, w)` and `condition` `(B, dim)` to `(B, C', h, w)`."""
        scale, shift = self.modulate(condition)[:, :, None, None].chunk(2, 1)
        h = self.convolution1(self.activation(self.norm1(x)))
        return self.shortcut(x) + self.convolution2(self.activation(self.norm2(h) * (1 + scale) + shift))


class PlaceAttention(nn.Module):
    """Self-attention between the places of `(B, C, h, w)` around a shortcut; starts as the identity.

    The attention `(B, heads, h w, h w)` passes through the submodule `attention.weights`, where it can be tapped.

    Args:
        channels: C.
        heads: must divide C.
        groups: of the norm; must divide C.
    """

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(groups, channels), Attention(channels, heads)
        zeroed(self.attention.project)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` in and out."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """`(B, C, h, w)` to `(B, C', h, w)`: residual blocks at one resolution, each followed by attention where it is asked for.

    Args:
        channels: C.
        wide: C'.
        dim: length of the condition.
        blocks: how many.
        heads: of the attention; 0 for none.
        groups: of the norms.
        last: whether attention follows the last block too.
    """

    def __init__(self, channels: int, wide: int, dim: int, blocks: int, heads: int, groups: int, last: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualConvolutions(wide if i else channels, wide, dim, groups) for i in range(blocks))
        self.attentions = nn.ModuleList(
            PlaceAttention(wide, heads, groups) if heads and (last or i + 1 < blocks) else nn.Identity() for i in range(blocks)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` `(B, C, h, w)` and `condition` `(B, dim)` to `(B, C', h, w)`."""
        for block, attention in zip(self.blocks, self.attentions):
            x = attention(block(x, condition))
        return x


class Grow(nn.Module):
    """`(B, C, h, w)` to `(B, C, 2 h, 2 w)`: each place repeated, then a 3 x 3 convolution."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        repeated = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)  # Nearest neighbour, with every derivative on every device.
        return self.convolution(repeated.reshape(batch, channels, 2 * height, 2 * width))


class UNet(DenoisingNetwork):
    """A U-Net told of level and label: residual stages down, a bottleneck, and stages up that read the stages down.

    A stage at level i has `width * multipliers[i]` channels; a strided convolution leads down, nearest neighbour and a convolution up.
    Each stage up reads the output of the stage down at its level. The bottleneck is two blocks, with attention between them where
    the lowest level has it. `taps` are `down.0`, ..., `bottleneck`, `up.0` (the lowest), ..., each `(B, C, h, w)`; `middle` is
    `bottleneck`. The defaults are this package's own choice, made for pictures of 8 to 64 pixels.

    Args:
        input_shape: `(C, H, W)`; H and W must be multiples of `2 ** (levels - 1)`.
        classes: labels besides the null label; 0 for none.
        width: channels of level 0; a quarter of the vector that tells level and label.
        multipliers: channels of each level over `width`; as many as there are levels.
        blocks: residual blocks of a stage.
        attention: for each level, whether attention follows its blocks. Its cost grows with the fourth power of the level's side.
        heads: of the attention; must divide the channels where there is attention.
        groups: of the norms; must divide `width`.
        slowest, fastest: the lowest and the highest frequency by which the level is told, in radians a unit; see `Condition`.

    Raises:
        UserError: samples that are not pictures, or of a size that cannot be halved so often; sizes below 1, or that do not divide;
            `attention` of another length than `multipliers`; a negative number of classes; frequencies out of order.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: tuple[bool, ...] = (False, True),
        heads: int = 2,
        groups: int = 8,
        slowest: float = 0.2,
        fastest: float = 4.0,
    ) -> None:
        channels, high, long = pictures(input_shape, "unet")
        positive("unet", width=width, blocks=blocks, heads=heads, groups=groups, multipliers=min(multipliers, default=0))
        levels = len(multipliers)
        wide = [width * factor for factor in multipliers]
        if len(attention) != levels:
            raise UserError(
                f"network 'unet': attention for {len(attention)} levels, but multipliers for {levels}", "give both the same length"
            )
        if high % 2 ** (levels - 1) or long % 2 ** (levels - 1):
            raise UserError(
                f"network 'unet': pictures of {high} x {long} cannot be halved {levels - 1} times for {levels} levels",
                f"give fewer multipliers, or pictures whose sides are multiples of {2 ** (levels - 1)}",
            )
        if width % groups:
            raise UserError(f"network 'unet': {groups} groups do not divide width {width}", "give a width that is a multiple of groups")
        odd = [c for c, asked in zip(wide, attention) if asked and c % heads]
        if odd:
            raise UserError(f"network 'unet': {heads} heads do not divide {odd[0]} channels", "give heads that divide width * multiplier")
        dim = 4 * width
        super().__init__(input_shape, classes, dim, slowest, fastest, "unet")
        heads_at = [heads if asked else 0 for asked in attention]
        ins = [width, *wide[:-1]]
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(Stage(c, w, dim, blocks, h, groups) for c, w, h in zip(ins, wide, heads_at))
        self.shrink = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2, padding=1) for w in wide[:-1])
        self.bottleneck = Stage(wide[-1], wide[-1], dim, 2, heads_at[-1], groups, last=False)
        self.up = nn.ModuleList(Stage(2 * w, w, dim, blocks, h, groups) for w, h in zip(wide[::-1], heads_at[::-1]))
        self.grow = nn.ModuleList(Grow(low, w) for low, w in zip(wide[:0:-1], wide[-2::-1]))
        self.norm, self.activation = nn.GroupNorm(groups, wide[0]), nn.SiLU()
        self.out = zeroed(nn.Conv2d(wide[0], channels, 3, padding=1))
        self.middle = "bottleneck"
        self.taps = (*(f"down.{i}" for i in range(levels)), self.middle, *(f"up.{i}" for i in range(levels)))

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """A tensor like `x`.

        Args:
            x: `(B, C, H, W)`.
            level: `(B,)` noise level as the caller codes it, best within about -2..2.
            label: `(B,)` int64 in 0..classes, of which `classes` is the null label; None for the null label throughout.
        """
        condition = self.condition(level, label, len(x))
        h, kept = self.stem(x), []
        for i, stage in enumerate(self.down):
            h = stage(self.shrink[i - 1](h) if i else h, condition)
            kept.append(h)
        h = self.bottleneck(h, condition)
        for i, stage in enumerate(self.up):
            h = stage(torch.cat([self.grow[i - 1](h) if i else h, kept.pop()], 1), condition)
        return self.out(self.activation(self.norm(h)))
