"""Plain diffusion training: how teachers come to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep


@dataclass
class DiffusionTraining(FewStep):
    """Learn to undo noise on real pictures; no teacher.

    L = mean (net(x_t, t, c) - target(x0, z, t))^2 with the target of the network's own kind of prediction, t drawn by `law`; labels are
    hidden with the recipe's `generate.label_dropout`, so that the network can be guided. A student of this method starts from fresh
    weights.
    """

    card = Card(
        id="diffusion-training",
        title="Denoising diffusion probabilistic models",
        year=2020,
        wing="sampling",
        family="baseline",
        claim="Samples of high quality after many steps.",
        equation="L = mean (net(x_t, t, c) - target)^2",
        arxiv="2006.11239",
        baseline="",
    )
    needs_teacher = False
    sampler = "heun"

    law: str = setting(
        "uniform",
        "of the times: uniform, logit-normal(0, 1) (Esser et al. 2024) or log-normal(-1.2, 1.2) (Karras et al. 2022)",
        choices=("uniform", "logit-normal", "log-normal"),
    )

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        pair, x0 = self.pair, batch.inputs
        mean, std = {"uniform": (0.0, 1.0), "logit-normal": (0.0, 1.0), "log-normal": (-1.2, 1.2)}[self.law]
        t = pair.student.process.draw(len(x0), self.law, mean, std, x0.device)
        labels = batch.labels if pair.classes else None
        if labels is not None and pair.spec.label_dropout:
            hidden = torch.rand(len(x0), device=x0.device) < pair.spec.label_dropout
            labels = torch.where(hidden, torch.full_like(labels, pair.classes), labels)
        return {"denoising": pair.student.denoising_loss(x0, torch.randn_like(x0), t, labels)}

    def sampling(self) -> dict[str, object]:
        return {"grid": self.pair.spec.grid}
