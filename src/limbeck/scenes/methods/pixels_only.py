"""Conversion by pictures alone: the student must look like the teacher from new cameras."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.engine.clock import Clock
from limbeck.method import Card, setting
from limbeck.scenes.fields import FieldMethod


@dataclass
class PixelsOnly(FieldMethod):
    """The deepest loss of `pvd` from the first step on: L = ||C_student - C_teacher||_F over the rays of random cameras."""

    card = Card(
        id="pixels-only",
        title="One is All: Bridging the Gap Between Neural Radiance Fields Architectures with Progressive Volume Distillation",
        year=2022,
        wing="scenes",
        family="baseline",
        claim="The ablation without losses inside the volume.",
        equation="L = ||C_s - C_t||_F",
        arxiv="2211.15977",
        baseline="from-images",
        certainty="verified-in-code",
    )
    contract = {"cameras": 2}

    cameras: int = setting(4, "new ones a step (released code: 1, with 4096 rays)", at_least=1)
    sparse_weight: float = setting(1e-4, "of a VM student's density factors (released code: 1e-4)", at_least=0)

    def losses(self, turn: str, clock: Clock) -> dict[str, Tensor]:
        problem = self.problem
        shot = problem.shot(*problem.rays_from(problem.new_poses(self.cameras), problem.training.batch))
        with torch.no_grad():
            truth = shot.composed(problem.teacher(shot.places, shot.views)).colour
        seen = shot.composed(problem.student(shot.places, shot.views)).colour
        return {"pixels": torch.linalg.vector_norm(seen - truth), **self.sparse(self.sparse_weight)}
