"""A small vision transformer, pre-norm, pooled by the mean (Dosovitskiy et al. 2020, arXiv:2010.11929; no class token)."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.network import Network, Patches, TokenPool, positive


class Attention(nn.Module):
    """Self-attention over `(B, L, D)`; the attention `(B, heads, L, L)` passes through the submodule `weights`, where it can be tapped.

    Attributes:
        heads: how many; fewer than D / size after pruning.
        size: width of a head.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.weights = nn.Softmax(dim=-1)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        weights = self.weights(query @ key.transpose(-1, -2) * self.size**-0.5)
        return self.project((weights @ value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention, then two layers with GELU, each around a shortcut; `(B, L, D)` in and out."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(Network):
    """Patches, learned positions, transformer blocks, norm, mean.

    Args:
        input_shape: `(C, H, W)`.
        classes: logits.
        patch: side of a patch in pixels; must divide height and width.
        dim: width of a token.
        depth: blocks.
        heads: of the attention; must divide `dim`.
        ratio: hidden width of a block's layers over `dim`.

    Raises:
        UserError: sizes that do not divide.
    """

    def __init__(
        self, input_shape: tuple[int, ...], classes: int, patch: int = 2, dim: int = 48, depth: int = 4, heads: int = 4, ratio: int = 2
    ) -> None:
        positive("vit", depth=depth, heads=heads, ratio=ratio)
        if dim % heads:
            raise UserError(f"network 'vit': {heads} heads do not divide dim {dim}", "give a dim that is a multiple of heads")
        stem = Patches(input_shape, patch, dim, "vit", positions=True)
        stages: list[nn.Module] = [TransformerBlock(dim, heads, ratio) for _ in range(depth)]
        super().__init__(stem, stages, nn.Sequential(nn.LayerNorm(dim), TokenPool()), dim, classes)
