"""DMD2: distribution matching at two time-scales with a diffusion GAN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.losses import field_loss, matching_direction
from limbeck.method import Card, setting
from limbeck.sampling.score_matching import ScoreMatching


@dataclass
class DMD2(ScoreMatching):
    """Move generated samples along the difference of two scores: the teacher's and that of the samples themselves.

    d = (X_F - X_T) / mean|x - X_T| at x re-noised to a random level, L = 0.5 mean (x - sg[x - d])^2 + gan * softplus(-C(F(x_s))). The
    fake score is updated `ratio` times as often; states of later steps come from running the generator itself.
    """

    card = Card(
        id="dmd2",
        title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        year=2024,
        wing="sampling",
        family="distribution",
        claim="One-step FID of 1.28 on ImageNet-64, surpassing the teacher, at 500 times fewer operations.",
        equation="grad = (X_F - X_T) / mean|x - X_T|;  + gan softplus(-C(F(x_s)))",
        arxiv="2405.14867",
        baseline="fewer-steps",
        deviations="the critic reads the very pass that trains the fake score (the code makes two); levels are continuous",
    )
    contract = {"ratio": 2}

    ratio: int = setting(5, "updates of the fake score for each one of the generator (paper: 5; 10 for Stable Diffusion 1.5)", at_least=1)
    gan: float = setting(0.003, "weight of the adversarial term (paper: 0.003 on ImageNet-64); 0 for none", at_least=0)

    def generator_losses(self, x: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        teacher = self.pair.teacher
        assert teacher is not None
        with torch.no_grad():
            level = self.levels(len(x))
            state = teacher.process.diffuse(x, torch.randn_like(x), level)
            direction = matching_direction(x, teacher.x0(state, level, labels), self.fake.x0(state, level, labels))
        return {"matching": field_loss(x, direction)}
