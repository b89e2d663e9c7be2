"""Decoupled DMD: guidance and distribution matching as two terms with re-noising schedules of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses import field_loss, pixel_distance
from limbeck.method import Card, setting
from limbeck.sampling.few_step import Pair
from limbeck.sampling.score_matching import ScoreMatching


@dataclass
class DecoupledDMD(ScoreMatching):
    """The guided matching gradient is a matching part plus (w - 1) times a guidance part; each is taken at its own noise level.

    d = (X_F - X_T)(x_DM) / W_DM - (w - 1) (X_T(c) - X_T(none))(x_CA) / W_CA. `schedule` says which levels: "hybrid" (guidance only at
    levels that the generator's step still has to resolve, matching everywhere), "constrained" (both), "full" (two independent draws),
    "shared" (one
    draw: DMD). `part` keeps one of the two for ablations. w is the recipe's `generate.guidance`.
    """

    card = Card(
        id="decoupled-dmd",
        title="Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
        year=2025,
        wing="sampling",
        family="distribution",
        claim="Guidance is the engine of few-step distillation, matching the shield that keeps it stable; separate schedules do better.",
        equation="d = (X_F - X_T)(x_DM)/W_DM - (w - 1)(X_T(c) - X_T(0))(x_CA)/W_CA",
        arxiv="2511.22677",
        baseline="dmd2",
        certainty="paper-text",
    )
    needs_classes = True
    contract = {"ratio": 2}

    ratio: int = setting(5, "updates of the fake score for each one of the generator (DMD2: 5)", at_least=1)
    schedule: str = setting(
        "hybrid", "levels of the two parts; see above (paper: hybrid)", choices=("hybrid", "constrained", "full", "shared")
    )
    part: str = setting("both", "keep both parts, or one for an ablation", choices=("both", "matching", "guidance"))

    def setup(self, pair: Pair) -> None:
        super().setup(pair)
        assert pair.teacher is not None
        if not pair.teacher.guidance.acts and self.part != "matching":
            raise UserError("decoupled-dmd splits off guidance, and the teacher has none", "set generate.guidance above 1, for example 2")
        self._scale = pair.teacher.guidance.scale
        self.teacher = pair.teacher.guided(1.0)

    def generator_losses(self, x: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        assert labels is not None
        teacher, process, count = self.teacher, self.teacher.process, len(x)
        with torch.no_grad():
            top = process.position(t) if self.schedule in ("constrained", "hybrid") else torch.ones_like(t)

            def draw(limit: Tensor) -> tuple[Tensor, Tensor]:
                level = process.at(self.low + (self.high - self.low) * torch.rand(count, device=x.device) * limit)
                return process.diffuse(x, torch.randn_like(x), level), level

            state, level = draw(top if self.schedule == "constrained" else torch.ones_like(top))
            seen = teacher.x0(state, level, labels)
            direction = torch.zeros_like(x)
            if self.part != "guidance":
                direction = (self.fake.x0(state, level, labels) - seen) / pixel_distance(x, seen)
            if self.part != "matching":
                if self.schedule != "shared":
                    state, level = draw(top)
                    seen = teacher.x0(state, level, labels)
                free = teacher.x0(state, level, torch.full_like(labels, self.pair.classes))
                # one normaliser for both parts where they share a draw, that of the guided teacher: this is DMD exactly
                guided = free + self._scale * (seen - free)
                if self.schedule == "shared" and self.part == "both":
                    direction = (self.fake.x0(state, level, labels) - guided) / pixel_distance(x, guided)
                else:
                    direction = direction - (self._scale - 1) * (seen - free) / pixel_distance(x, seen)
        return {"matching": field_loss(x, torch.nan_to_num(direction))}
