"""MLP-Mixer: layers over tokens and layers over channels in turn (Tolstikhin et al. 2021, arXiv:2105.01601)."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.zoo.network import Network, Patches, TokenPool, positive


class MixerBlock(nn.Module):
    """Two layers across the L tokens, then two across the D channels, each around a shortcut; `(B, L, D)` in and out."""

    def __init__(self, length: int, dim: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(length, ratio * length), nn.GELU(), nn.Linear(ratio * length, length))
        self.norm2 = nn.LayerNorm(dim)
        self.channels = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(Network):
    """Patches, mixer blocks, norm, mean.

    Args:
        input_shape: `(C, H, W)`.
        classes: logits.
        patch: side of a patch in pixels; must divide height and width.
        dim: width of a token.
        depth: blocks.
        ratio: hidden width over outer width in both kinds of layers.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, patch: int = 2, dim: int = 48, depth: int = 4, ratio: int = 2) -> None:
        positive("mixer", depth=depth, ratio=ratio)
        stem = Patches(input_shape, patch, dim, "mixer", positions=False)
        stages: list[nn.Module] = [MixerBlock(stem.length, dim, ratio) for _ in range(depth)]
        super().__init__(stem, stages, nn.Sequential(nn.LayerNorm(dim), TokenPool()), dim, classes)
