"""Variational score distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.method import Card
from limbeck.scenes.score_method import Following, Noised


@dataclass
class VSD(Following):
    """Treat what is optimised as particles of a distribution and bring that distribution, noised, to the score model's.

    grad_x = w(t) (eps(x_t; y, s) - eps_phi(x_t; y, c)): what is subtracted is not the injected noise but what a follower, which learns
    from the present renderings, says of it. Guidance as in sampling (7.5) is then enough.
    """

    card = Card(
        id="vsd",
        title="ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
        year=2023,
        wing="scenes",
        family="score",
        claim="With guidance 7.5 as good as ancestral sampling, and more diverse and better samples than score distillation sampling.",
        equation="grad_x = w(t) (eps_pre(x_t; y, s) - eps_phi(x_t; y, c));  L_phi = |eps_phi - eps|^2 on present renderings",
        arxiv="2305.16213",
        baseline="sds",
        deviations=(
            "the follower is a whole copy of the score model (small networks) or a fresh perceptron (exact scores), not adapters; it "
            "learns in the prior's own prediction, at 1e-3"
        ),
    )
    contract = {"width": 16}

    def direction(self, at: Noised) -> Tensor:
        return at.guided(self.guidance) - self.follows(at, self.told)
