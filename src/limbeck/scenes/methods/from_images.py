"""A field learned from posed pictures alone: how teachers are trained, and what conversions are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.engine.clock import Clock
from limbeck.method import Card, setting
from limbeck.scenes.fields import FieldMethod


@dataclass
class FromImages(FieldMethod):
    """Random pixels of random views, over random backgrounds: L = mean |C - C_true|^2."""

    card = Card(
        id="from-images",
        title="NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis",
        year=2020,
        wing="scenes",
        family="baseline",
        claim="A field optimised through volume rendering on posed pictures shows the scene from new views.",
        equation="L = mean |C(r) - C_true(r)|^2",
        arxiv="2003.08934",
        baseline="",
        certainty="paper-text",
        deviations="one field instead of a coarse and a fine one; random backgrounds where pictures have transparency, as Instant-NGP does",
    )
    needs_teacher = False

    sparse_weight: float = setting(1e-4, "of the mean size of a VM student's density factors (TensoRF: 8e-5 to 4e-5)", at_least=0)

    def losses(self, turn: str, clock: Clock) -> dict[str, Tensor]:
        problem = self.problem
        origins, directions, colour, opacity = problem.views.train.random_pixels(problem.training.batch)
        shot = problem.shot(origins, directions)
        seen = shot.composed(problem.student(shot.places, shot.views))
        truth = colour + (1 - opacity) * shot.background
        return {"pixels": (seen.colour - truth).square().mean(), **self.sparse(self.sparse_weight)}
