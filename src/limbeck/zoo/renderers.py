"""What renders pictures and can be made again from its name: the students of the scenes wing."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from limbeck.vector.drawing import DirectDrawing
from limbeck.vector.path_vae import LatentDrawing, PathVAE
from limbeck.zoo.pictures import Particles, ViewGenerator

RENDERERS: dict[str, Callable[..., nn.Module]] = {
    "particles": Particles,
    "picture-generator": ViewGenerator,
    "drawing": DirectDrawing,
    "latent-drawing": LatentDrawing,
    "path-vae": PathVAE,
}
"""By name; they read numbers of variants (a path autoencoder: paths), not samples of data."""
