"""What methods share that optimise a drawing: score distillation first, then cleaning layer by layer towards a picture of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import setting
from limbeck.scenes.score_method import Following, Noised, PictureProblem
from limbeck.vector import Drawing, composite
from limbeck.vector.simplify import worth_keeping


@dataclass
class DrawingMethod(Following):
    """Base of the methods whose student is a `limbeck.vector.Drawing`: VSD on its picture, then `clean` of the steps for cleaning.

    When cleaning begins, layers that nobody sees are dropped, the drawing's picture, denoised by the score model from a low noise level,
    becomes the target, and the layers are fitted to it: |R - I*|^2 + overlap * mean product of two layers' masks.
    """

    kind: ClassVar[str] = "paths"

    clean: float = setting(0.3, "share of the steps for cleaning (this package's choice)", at_least=0, at_most=1)
    refine: float = setting(
        0.15, "noise level, a place in [0, 1], from which the target is denoised; 0: the picture as it is", at_least=0, at_most=1
    )
    overlap: float = setting(0.05, "weight of overlap while cleaning (a working value)", at_least=0)
    fit: float = setting(30.0, "weight of the squared error to the target, summed over pixels' mean (a working value)", above=0)

    def setup(self, problem: PictureProblem) -> None:
        if not isinstance(problem.student, Drawing):
            raise UserError(
                f"{self.card.id} optimises drawings, and the student is a {type(problem.student).__name__}",
                "set student={model: drawing, args: {paths: 4}}",
            )
        super().setup(problem)

    def cleaning(self, clock: Clock) -> bool:
        """Whether this step belongs to the second stage."""
        return clock.step >= round(clock.total * (1 - self.clean))

    def direction(self, at: Noised) -> Tensor:
        return at.guided(self.guidance) - self.follows(at, self.told)

    def turns(self, clock: Clock) -> tuple[str, ...]:
        return ("student",) if self.cleaning(clock) else tuple(super().turns(clock))

    def losses(self, turn: str, clock: Clock) -> dict[str, Tensor]:
        if not self.cleaning(clock):
            return super().losses(turn, clock)
        student = self.problem.student
        if "target" not in self.state:
            self.state["target"] = self._target()
        pick = self.picks()
        masks = student.masks(pick)
        background = torch.full((student.input_shape[0],), student.background, device=masks.device)
        x = composite(masks, student.colours()[pick], background)
        terms = {"fit": self.fit * (x - self.state["target"][pick]).square().mean(), **self.extra_losses(pick, x, clock)}
        if self.overlap and student.paths > 1:
            terms["overlap"] = self.overlap * overlap(masks)
        return terms

    @torch.no_grad()
    def _target(self) -> Tensor:
        """`(V, C, H, W)` the pictures to clean towards; drops layers that are not seen."""
        problem, student = self.problem, self.problem.student
        student.kept.copy_(worth_keeping(student))
        pick = torch.arange(student.variants, device=problem.device)
        x = student.render(pick)
        if not self.refine:
            return x
        at = Noised(
            problem.teacher, x, torch.randn_like(x), torch.full((len(x),), self.refine, device=x.device), self.asked(pick), pick, 0.0
        )
        return problem.teacher.x0(at.state, at.t, at.labels).clamp(-1, 1)

    def finish(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, Drawing)
        student.kept.copy_(self.problem.student.kept)  # a moving average would make it a fraction
        student.kept.copy_(worth_keeping(student) * student.kept)
        return student


def overlap(masks: Tensor) -> Tensor:
    """Mean over pixels and pairs of the product of two layers' masks `(B, n, H, W)`."""
    both = masks.sum(1).square() - masks.square().sum(1)
    layers = masks.shape[1]
    return both.mean() / (layers * (layers - 1))
