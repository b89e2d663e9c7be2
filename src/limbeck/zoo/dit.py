"""A small diffusion transformer with adaLN-zero blocks (Peebles and Xie 2022, arXiv:2212.09748)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.denoising import DenoisingNetwork, zeroed
from limbeck.zoo.network import Patches, pictures, positive
from limbeck.zoo.vit import Attention


def grid_positions(rows: int, columns: int, dim: int) -> Tensor:
    """`(rows * columns, dim)` sines and cosines of each token's row (first half) and column (second half).

    Angular frequencies fall from 1 a token to almost 1 / 10 000, as Vaswani et al. 2017 (arXiv:1706.03762) have it; `dim` must be a
    multiple of 4.
    """
    speeds = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * speeds for place in (row, column)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


class DiTBlock(nn.Module):
    """`(B, L, D)` in and out: attention, then two layers, each normed, scaled and shifted, and gated by the condition (adaLN-zero).

    Gates start at 0, hence the block as the identity. `attention` is the attention before its gate.

    Args:
        dim: D, and the length of the condition.
        heads: of the attention; must divide `dim`.
        ratio: hidden width of the layers over `dim`.
        linear: one linear map in place of the two layers.
    """

    def __init__(self, dim: int, heads: int, ratio: int, linear: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, elementwise_affine=False), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        layers = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(ratio * dim, dim))
        self.mlp = nn.Linear(dim, dim) if linear else layers
        self.modulate = zeroed(nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` `(B, L, D)` and `condition` `(B, D)` to `(B, L, D)`."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(condition)[:, None].chunk(6, 2)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(DenoisingNetwork):
    """A diffusion transformer over patches, told of level and label by scales, shifts and gates.

    `taps` are the blocks, `(B, L, dim)` each with L = (H / patch) * (W / patch); `middle` is the block that ends the first half. The
    attention of block i is `blocks.i.attention`. The block is that of Peebles and Xie with their ratio of 4; the sizes are this
    package's own choice, made for pictures of 8 to 64 pixels.

    Args:
        input_shape: `(C, H, W)`.
        classes: labels besides the null label; 0 for none.
        patch: side of a patch in pixels; must divide height and width.
        dim: width of a token and of the vector that tells level and label; a multiple of 4 and of `heads`.
        depth: blocks.
        heads: of the attention.
        ratio: hidden width of a block's layers over `dim`.
        slowest, fastest: the lowest and the highest frequency by which the level is told, in radians a unit; see `Condition`.
        linear: numbers of the blocks that have one linear map in place of their two layers (made by pruning).

    Raises:
        UserError: samples that are not pictures; sizes below 1, or that do not divide; a negative number of classes; frequencies out of
            order.
    """

    positions: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        patch: int = 2,
        dim: int = 96,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 4,
        slowest: float = 0.2,
        fastest: float = 4.0,
        linear: Sequence[int] = (),
    ) -> None:
        channels, height, width = pictures(input_shape, "dit")
        positive("dit", dim=dim, depth=depth, heads=heads, ratio=ratio)
        if dim % heads:
            raise UserError(f"network 'dit': {heads} heads do not divide dim {dim}", "give a dim that is a multiple of heads")
        if dim % 4:
            raise UserError(
                f"network 'dit': dim {dim} is no multiple of 4", "give one: a quarter each for sine and cosine of row and column"
            )
        super().__init__(input_shape, classes, dim, slowest, fastest, "dit")
        self.stem = Patches(input_shape, patch, dim, "dit", positions=False)
        self.patch, self.rows, self.columns = patch, height // patch, width // patch
        self.register_buffer("positions", grid_positions(self.rows, self.columns, dim), persistent=False)  # As Condition.frequencies.
        self.linear = tuple(linear)
        if not set(self.linear) <= set(range(depth)):
            raise UserError(f"network 'dit': linear names blocks {list(linear)} of {depth}", f"give numbers from 0 to {depth - 1}")
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, ratio, number in self.linear) for number in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulate = zeroed(nn.Linear(dim, 2 * dim))
        self.out = zeroed(nn.Linear(dim, patch * patch * channels))
        self.taps = tuple(f"blocks.{i}" for i in range(depth))
        self.middle = self.taps[(depth - 1) // 2]

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """A tensor like `x`.

        Args:
            x: `(B, C, H, W)`.
            level: `(B,)` noise level as the caller codes it, best within about -2..2.
            label: `(B,)` int64 in 0..classes, of which `classes` is the null label; None for the null label throughout.
        """
        condition = self.condition(level, label, len(x))
        h = self.stem(x) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.modulate(condition)[:, None].chunk(2, 2)
        squares = self.out(self.norm(h) * (1 + scale) + shift)
        squares = squares.view(len(x), self.rows, self.columns, self.patch, self.patch, self.input_shape[0])
        return squares.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
