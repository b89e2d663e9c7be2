"""Pictures as parameters: free pixels, and a small generator of numbered views."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.network import positive


class Particles(nn.Module):
    """`variants` pictures whose pixels are the parameters; they begin as noise.

    Args:
        input_shape: `(C, H, W)`. classes: not used. variants: how many. spread: standard deviation of the first pixels.

    Raises:
        UserError: no picture.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int = 0, variants: int = 16, spread: float = 0.5) -> None:
        super().__init__()
        positive("particles", variants=variants)
        if spread < 0:
            raise UserError(f"particles with a spread of {spread}", "give 0 or more")
        self.input_shape, self.variants = tuple(input_shape), variants
        self.pixels = nn.Parameter(spread * torch.randn(variants, *self.input_shape))

    def render(self, pick: Tensor) -> Tensor:
        """`(B, C, H, W)`: the pictures numbered `pick` `(B,)`."""
        return self.pixels[pick]

    def forward(self, pick: Tensor) -> Tensor:
        """As `render`."""
        return self.render(pick)


class ViewGenerator(nn.Module):
    """A perceptron from the number of a view (a camera, a class, a prompt) and noise to a picture: one network for all of them.

    Args:
        input_shape: `(C, H, W)`. classes: not used. variants: views. latent: numbers of noise; 0: each view is one picture.
        width, depth: of the layers.

    Raises:
        UserError: sizes below 1.
    """

    views = True
    """Variants are views of one thing, not particles: a follower may be told which one it sees."""

    def __init__(
        self, input_shape: tuple[int, ...], classes: int = 0, variants: int = 10, latent: int = 16, width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        positive("picture-generator", variants=variants, width=width, depth=depth)
        if latent < 0:
            raise UserError(f"a picture-generator with latent={latent}", "give 0 for one picture a view, or more")
        self.input_shape, self.variants, self.latent = tuple(input_shape), variants, latent
        self.view = nn.Embedding(variants, width)
        self.noise = nn.Linear(latent, width) if latent else None
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.SiLU(), nn.Linear(width, width)]
        self.body = nn.Sequential(*layers, nn.SiLU(), nn.Linear(width, math.prod(self.input_shape)))

    def render(self, pick: Tensor, noise: Tensor | None = None) -> Tensor:
        """`(B, C, H, W)` in (-1, 1) for views `pick` `(B,)`; noise `(B, latent)` comes from torch's global generator if left out."""
        h = self.view(pick)
        if self.noise is not None:
            h = h + self.noise(torch.randn(len(pick), self.latent, device=h.device) if noise is None else noise)
        return self.body(h).tanh().view(-1, *self.input_shape)

    def forward(self, pick: Tensor) -> Tensor:
        """As `render`."""
        return self.render(pick)
