"""Asynchronous score distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.losses import later_place
from limbeck.method import Card, setting
from limbeck.scenes.score_method import Noised, ScoreDistillation


@dataclass
class ASD(ScoreDistillation):
    """Variational score distillation without a follower: the frozen score model itself, at a noisier time, takes its part.

    grad_x = w(t) (eps(x_t; y, s) - eps(x_t'; y)), x_t' made with the very same noise at t' = t + u eta (t - t_min), u ~ U(0, 1), and
    read without guidance. A frozen network errs less at noisier times, as a follower that fits the renderings would.
    """

    card = Card(
        id="asd",
        title="ScaleDreamer: Scalable Text-to-3D Synthesis with Asynchronous Score Distillation",
        year=2024,
        wing="scenes",
        family="score",
        claim="Stable to train and scales up to 100k prompts while the diffusion model's weights stay as they are.",
        equation="grad_x = w(t) (eps_pre(x_t; y, s) - eps_pre(x_t'; y, 1)),  t' = t + u eta (t - t_min), same eps",
        arxiv="2407.02040",
        baseline="vsd",
        deviations=(
            "times are continuous, so nothing is rounded down to a whole step; the shift is to noisier times, as in the released code (the "
            "abstract calls them earlier, as sampling passes them)"
        ),
    )
    anneal: ClassVar[str] = "linear"

    eta: float = setting(0.1, "the greatest shift, as a share of the way from the lowest level", at_least=0)
    random_shift: bool = setting(True, "a random part of the shift for each sample; false: the whole shift")
    levels: tuple[float, float] = setting((0.5, 0.98), "lowest and highest noise level at first, places in [0, 1]", at_least=0, at_most=1)

    def direction(self, at: Noised) -> Tensor:
        share = torch.rand_like(at.place) if self.random_shift else 1.0
        return at.guided(self.guidance) - at.at(later_place(at.place, self.eta, at.low, share)).given()
