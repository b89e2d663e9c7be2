"""Decoupled DMD: guidance and distribution matching as two terms with re-noising schedules of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.diffusion import expand
from limbeck.errors import UserError
from limbeck.losses import field_loss, matching_direction, pixel_distance
from limbeck.method import Card, setting
from limbeck.sampling.few_step import Pair
from limbeck.sampling.score_matching import ScoreMatching


@dataclass
class DecoupledDMD(ScoreMatching):
    """The guided matching gradient is a matching part plus (w - 1) times a guidance part; each is taken at its own noise level.

    d = (X_F - X_T)(x_DM) / W_DM - (w - 1) (X_T(c) - X_T(none))(x_CA) / W_CA. `schedule` says which levels: "hybrid" (guidance only at
    levels that the generator's step still has to resolve, matching everywhere), "constrained" (both), "full" (two independent draws),
    "shared" (one draw: DMD). `part` keeps one of the two for ablations. w is the recipe's `generate.guidance`.
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
        self.teacher = pair.teacher.guided(1.0)

    def _strength(self, level: Tensor, x: Tensor) -> Tensor:
        """w - 1 at each sample's time, 0 outside the interval in which the teacher is guided."""
        assert self.pair.teacher is not None
        guidance, ratio = self.pair.teacher.guidance, self.teacher.process.angle(level).clamp(max=math.pi / 2 - 1e-6).tan()
        inside = (ratio >= guidance.low) & ((ratio <= guidance.high) | math.isinf(guidance.high))
        return expand(torch.where(inside, guidance.scale - 1.0, 0.0), x)

    def generator_losses(self, x: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        assert labels is not None
        teacher, process, count = self.teacher, self.teacher.process, len(x)
        with torch.no_grad():
            here = process.place(process.time_at(self.pair.student.process.angle(t)))  # the generator's step

            def draw(constrained: bool) -> tuple[Tensor, Tensor, Tensor]:
                high = torch.full_like(here, self.high)
                high = torch.minimum(high, here) if constrained else high
                low = high.clamp(max=self.low)
                level = process.at(low + (high - low) * torch.rand(count, device=x.device))
                state = process.diffuse(x, torch.randn_like(x), level)
                return state, level, teacher.x0(state, level, labels)

            def pull(state: Tensor, level: Tensor, seen: Tensor) -> Tensor:
                free = teacher.x0(state, level, torch.full_like(labels, self.pair.classes))
                return self._strength(level, x) * (seen - free)

            if (
                self.schedule == "shared" and self.part == "both"
            ):  # one normaliser for both parts, that of the guided teacher: this is DMD exactly
                state, level, seen = draw(False)
                direction = matching_direction(x, seen + pull(state, level, seen), self.fake.x0(state, level, labels))
            else:
                direction = torch.zeros_like(x)
                if self.part != "guidance":
                    state, level, seen = draw(self.schedule == "constrained")
                    direction = (self.fake.x0(state, level, labels) - seen) / pixel_distance(x, seen)
                if self.part != "matching":
                    state, level, seen = draw(self.schedule in ("constrained", "hybrid"))
                    direction = direction - pull(state, level, seen) / pixel_distance(x, seen)
        return {"matching": field_loss(x, torch.nan_to_num(direction))}
