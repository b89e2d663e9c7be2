"""The path autoencoder that drawings made of latents stand on: trained once on glyph outlines and kept."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import __version__, models, schema, storage
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram, Tick
from limbeck.engine.schedule import make_optimizer
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.vector import canonical, coverage, glyph_outlines, intersection_rate
from limbeck.vector.bezier import normalised, similar
from limbeck.vector.fit import resegment
from limbeck.vector.path_vae import MASK, PathVAE, vae_losses

CHARACTERS = string.ascii_letters + string.digits
"""Whose outlines the autoencoder learns."""


@dataclass
class Outlines:
    """Closed paths in one form.

    Attributes:
        points: `(N, 3 S, 2)` canonical, bounding box centred, longer side 2.
        masks: `(N, MASK, MASK)` in [0, 1].
    """

    points: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.points)


def outlines(segments: int, turns: int = 1, characters: str = CHARACTERS, seed: int = 0) -> Outlines:
    """Every contour of the characters in every DejaVu face in `segments` segments, as it is and `turns` times turned and stretched.

    A contour that crosses itself in so few segments is left out: the autoencoder shall know none.

    Raises:
        UserError: nothing is left.
    """
    rng = torch.Generator().manual_seed(seed)
    found = []
    for outline in glyph_outlines(characters):
        for chain in outline.chains:
            own = normalised(resegment(chain, segments))[0]
            if intersection_rate(own[None]):
                continue
            found.append(canonical(own))
            for _ in range(turns):
                turn, stretch = torch.rand(2, generator=rng, dtype=torch.float64)
                angle = (turn - 0.5) * torch.pi / 2
                stretched = own * torch.stack([torch.ones_like(stretch), (0.7 * (2 * stretch - 1)).exp()])
                moved = similar(stretched, torch.ones_like(angle), angle, torch.zeros(2, dtype=torch.float64))
                found.append(canonical(normalised(moved)[0]))
    if not found:
        raise UserError(f"no outline is left in {segments} segments", "give more segments a path")
    points = torch.stack(found).float()
    return Outlines(points, torch.cat([coverage(part, MASK) for part in points.split(128)]))


class PathLessons(PlainProgram):
    """Training of a path autoencoder on outlines, a random batch a step."""

    def __init__(self, network: PathVAE, data: Outlines, training: Any, kl: float) -> None:
        self.network, self.data, self.training, self.kl = network, data, training, kl
        self.total = self.steps_per_epoch = int(training.steps)

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"network": make_optimizer(self.training, self.network.parameters())}

    def batches(self, epoch: int, start: int) -> Iterator[Tick]:
        return (Tick() for _ in range(start, self.steps_per_epoch))

    def turns(self, clock: Clock) -> tuple[str, ...]:
        return ("network",)

    def losses(self, turn: str, batch: Tick, clock: Clock) -> dict[str, Tensor]:
        pick = torch.randint(len(self.data), (int(self.training.batch),))
        device = next(self.network.parameters()).device
        return vae_losses(self.network, self.data.points[pick].to(device), self.data.masks[pick].to(device), kl=self.kl)


def path_network(
    segments: int, latent: int, width: int, steps: int, kl: float, session: Session, characters: str = CHARACTERS, seed: int = 0
) -> PathVAE:
    """A trained path autoencoder, from the cache or trained now.

    Args:
        segments, latent, width: of the network, see `PathVAE`. steps: of training, 64 outlines each. kl: weight of the prior.
        characters: whose outlines it learns.
    """
    seed_everything(seed, "path autoencoder")
    network = PathVAE(latent, segments, width).to(session.device)
    training = schema.Training(steps=steps, batch=64, optimizer="adam", lr=2e-3, weight_decay=0.0, schedule="cosine", warmup=0.05, clip=1.0)
    content = {
        "what": "path autoencoder",
        **network.limbeck_config,
        "start": storage.tensors_fingerprint(network.state_dict()),
        "train": training.model_dump(),
        "kl": kl,
        "characters": characters,
        "limbeck": __version__,
        "device": session.device.type,
    }
    if session.precision != "no":
        content["precision"] = session.precision

    def train(work: Path, key: str) -> nn.Module:
        lessons = PathLessons(network, outlines(segments, characters=characters), training, kl)
        session.fit(lessons, "paths", seed=seed, folder=work, digest=key, evaluate=False)
        return network

    return models.kept(content, network, session, "path autoencoder", train).eval()  # type: ignore[return-value]
