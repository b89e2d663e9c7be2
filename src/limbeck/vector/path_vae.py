"""A variational autoencoder of closed paths with two branches, one for the row of points and one for the picture of the inside."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.vector.bezier import polyline, similar
from limbeck.vector.drawing import Drawing, circle

MASK = 24
"""Pixels of a side of the pictures of single paths (paper, as recalled: 64)."""


class PathDecoder(nn.Module):
    """From a latent to a closed chain: a residual perceptron whose output is added to the unit circle.

    Args:
        latent: numbers of a latent. segments: cubic segments of a path. width: of the layers.
    """

    def __init__(self, latent: int = 24, segments: int = 8, width: int = 128) -> None:
        super().__init__()
        self.segments = segments
        self.stem = nn.Linear(latent, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.out = nn.Linear(width, 6 * segments)
        self.register_buffer("circle", circle(segments))

    def forward(self, z: Tensor) -> Tensor:
        """`(..., latent)` to `(..., 3 S, 2)`, within about [-1, 1]."""
        h = F.silu(self.stem(z))
        for block in self.blocks:
            h = h + block(h)
        return self.circle + self.out(h).unflatten(-1, (3 * self.segments, 2))


class PathVAE(nn.Module):
    """Encoder of both branches, fused; decoder of both branches (Zhang et al. 2024, arXiv:2405.10317, section 3.1).

    Args:
        latent: numbers of a latent (paper: 24). segments: of each path. width: of the layers.

    Raises:
        UserError: sizes below 1.
    """

    def __init__(self, latent: int = 24, segments: int = 8, width: int = 64) -> None:
        super().__init__()
        if min(latent, width) < 1 or segments < 2 or width % 4:
            raise UserError(
                f"a path autoencoder with latent={latent}, segments={segments}, width={width}", "give 1, 2 and a multiple of 4 at least"
            )
        self.latent = latent
        self.limbeck_config: dict[str, Any] = {"ref": "path-vae", "args": {"latent": latent, "segments": segments, "width": width}}
        self.embed, self.place = nn.Linear(6, width), nn.Parameter(0.02 * torch.randn(segments, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.sequence = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.image = nn.Sequential(
            nn.Conv2d(1, 8, 4, 4),
            nn.SiLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(16 * (MASK // 8) ** 2, width),
            nn.SiLU(),
        )
        self.fused = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 2 * latent))
        self.decoder = PathDecoder(latent, segments, 2 * width)
        self.mask = nn.Sequential(
            nn.Linear(latent, 16 * (MASK // 8) ** 2),
            nn.SiLU(),
            nn.Unflatten(1, (16, MASK // 8, MASK // 8)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(8, 1, 4, 4),
        )

    def encode(self, points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `(B, latent)` of paths `(B, 3 S, 2)` and their pictures `(B, MASK, MASK)` in [0, 1]."""
        tokens = self.embed(points.unflatten(1, (-1, 3)).flatten(2)) + self.place
        row = self.sequence(tokens).mean(1)
        return self.fused(torch.cat([row, self.image(mask[:, None] * 2 - 1)], 1)).chunk(2, 1)

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        """The path `(B, 3 S, 2)` that the mean latent stands for."""
        return self.decoder(self.encode(points, mask)[0])


def chamfer(points: Tensor, other: Tensor, per_segment: int = 3) -> Tensor:
    """Mean squared distance of curve points of closed chains `(B, 3 S, 2)` to the nearest ones of the other, both ways."""
    squared = torch.cdist(polyline(points, per_segment), polyline(other, per_segment)).square()
    return 0.5 * (squared.amin(1).mean() + squared.amin(2).mean())


def roughness(points: Tensor) -> Tensor:
    """Mean square of the second differences of closed chains `(B, 3 S, 2)`."""
    return (points.roll(-1, 1) - 2 * points + points.roll(1, 1)).square().sum(-1).mean()


def vae_losses(
    network: PathVAE, points: Tensor, mask: Tensor, *, image: float = 0.1, kl: float = 0.01, smooth: float = 0.1
) -> dict[str, Tensor]:
    """The terms of the autoencoder's loss; points are in canonical form, so that they can be compared one by one.

    Args:
        points: `(B, 3 S, 2)`. mask: `(B, MASK, MASK)`.
        image, kl, smooth: weights of cross-entropy of the picture, KL to N(0, I), and second differences.
    """
    mean, log_variance = network.encode(points, mask)
    z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    made = network.decoder(z)
    return {
        "points": (made - points).square().sum(-1).mean(),
        "chamfer": chamfer(made, points),
        "picture": image * F.binary_cross_entropy_with_logits(network.mask(z)[:, 0], mask),
        "kl": kl * 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean(),
        "smooth": smooth * roughness(made),
    }


class LatentDrawing(Drawing):
    """Drawings whose paths are latents of a path autoencoder, each with a size, a turn and a place of its own.

    Args:
        see `Drawing`; latent, width: of the decoder, as in `PathVAE`; radius: of the first shapes, as in `DirectDrawing`.

    Attributes:
        z: `(V, n, latent)`. size: `(V, n)` log of the scale. turn: `(V, n)` radians. shift: `(V, n, 2)`.
        decoder: frozen.
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
        latent: int = 24,
        width: int = 64,
    ) -> None:
        super().__init__(input_shape, variants, paths, segments, background, softness)
        self.z = nn.Parameter(0.5 * torch.randn(variants, paths, latent))
        self.size = nn.Parameter((radius * (0.5 + 0.5 * torch.rand(variants, paths))).log())
        self.turn = nn.Parameter(0.1 * torch.randn(variants, paths))
        self.shift = nn.Parameter(torch.rand(variants, paths, 2) - 0.5)
        self.decoder = PathDecoder(latent, segments, 2 * width).requires_grad_(False)

    def chains(self, pick: Tensor | None = None) -> Tensor:
        pick = torch.arange(self.variants, device=self.z.device) if pick is None else pick
        size = self.size[pick].clamp(math.log(0.03), math.log(2.0)).exp()
        return similar(self.decoder(self.z[pick]), size, self.turn[pick], self.shift[pick])
