"""Entropic score distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses import entropic_prediction
from limbeck.method import Card, setting
from limbeck.scenes.score_method import Following, Noised, PictureProblem


@dataclass
class ESD(Following):
    """Variational score distillation whose follower speaks partly of all views at once: the entropy over views is raised.

    grad_x = w(t) (eps(x_t; y, s) - lam phi(x_t; y) - (1 - lam) phi(x_t; y, c)), c the view. lam 0 is VSD told the view, under which each
    view alone goes to the likeliest picture; equal to guiding the follower by 1 - lam.
    """

    card = Card(
        id="esd",
        title="Taming Mode Collapse in Score Distillation for Text-to-3D Generation",
        year=2023,
        wing="scenes",
        family="score",
        claim="An effective treatment for Janus artifacts in score distillation.",
        equation="grad_x = w(t) (eps_pre(x_t; y, s) - lam phi(x_t; y) - (1 - lam) phi(x_t; y, c))",
        arxiv="2401.00909",
        baseline="vsd",
        deviations="see vsd; every variant counts as a view, also a particle",
    )
    contract = {"width": 16}

    lam: float = setting(
        0.5, "share of the follower of all views (1 - the released code's guidance of the follower)", at_least=0, at_most=1
    )
    view: str = setting("yes", "the follower is told the view", choices=("yes",))

    def setup(self, problem: PictureProblem) -> None:
        if self.lam > 0 and self.drop == 0:
            raise UserError("esd: the follower of all views is never trained when method.drop is 0", "set method.drop=0.1, or lam=0")
        super().setup(problem)

    def direction(self, at: Noised) -> Tensor:
        return at.guided(self.guidance) - entropic_prediction(self.follows(at, False), self.follows(at, True), self.lam)
