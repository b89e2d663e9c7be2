"""FYI: mirror the synthetic images inside any matching method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import method as registry
from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import Card, setting


def mirrored(x: Tensor) -> Tensor:
    """`(2 * B, C, H, W)`: the pictures, then their mirror images (left and right exchanged)."""
    return torch.cat([x, x.flip(-1)])


@dataclass
class FYI(Condenser):
    """Any matching method, with each synthetic batch doubled by its mirror images before augmentation.

    B(x) = concat(x, flip(x)) inside the matching and inside the networks that learn from the set meanwhile, never in the evaluation. One
    image then need not carry a part on both sides. Wrong where a mirror image belongs to another class (digits, letters).
    """

    card = Card(
        id="fyi",
        title="FYI: flip your images for dataset distillation",
        year=2024,
        wing="condensation",
        family="distribution",
        claim="Doubling synthetic batches with their mirror images improves several matching methods without changing their losses.",
        equation="S_c -> concat(S_c, flip(S_c)) inside the matching of any base method",
        arxiv="2407.08113",
        baseline="distribution-matching",
        deviations="The base's own augmentation is kept; the released code also mirrors at random in every step.",
    )
    contract = {"base_settings": {"batch_real": 8}}

    base: str = setting("distribution-matching", "id of the matching method that is wrapped")
    base_settings: dict = setting({}, "its settings, among them `iterations`")  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        made = registry.make(self.base, self.base_settings)
        if not isinstance(made, Condenser) or isinstance(made, FYI) or made.card.family not in ("distribution", "gradient", "trajectory"):
            raise UserError(
                f"fyi cannot wrap {self.base}", "wrap a matching method: distribution-matching, gradient-matching, trajectory-matching ..."
            )
        if self.init != "real":
            raise UserError("fyi has no start of its own", f"set method.base_settings.init={self.init}")
        self._base = made
        self._base.views = mirrored  # type: ignore[method-assign]
        self.iterations = self.iterations or made.iterations
        self.needs_norm, self.schedule = made.needs_norm, made.schedule  # type: ignore[misc]

    def prepare(self, problem: Problem) -> None:
        if not problem.images:
            raise UserError(f"fyi mirrors pictures, and {problem.data.name} has none", f"use {self.base} itself")
        self._base.prepare(problem)

    def begin(self, problem: Problem) -> SyntheticSet:
        return self._base.begin(problem)

    def modules(self) -> dict[str, nn.Module]:
        return self._base.modules()

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        return self._base.optimizers(set)

    def turns(self, clock: Clock) -> tuple[str, ...]:
        return self._base.turns(clock)

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        return self._base.losses(turn, set, problem, clock)

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        self._base.after_step(set, problem, clock)

    def alarms(self) -> list[str]:
        return self._base.alarms()

    def memory(self) -> dict[str, Any]:
        return self._base.memory()

    def restore(self, memory: Mapping[str, Any]) -> None:
        self._base.restore(memory)

    def finish(self, set: SyntheticSet, problem: Problem) -> SyntheticSet:
        return self._base.finish(set, problem)

    def soften(self, set: SyntheticSet, problem: Problem) -> SyntheticSet | None:
        return self._base.soften(set, problem)

    def figures(self, set: SyntheticSet, problem: Problem) -> dict[str, float]:
        """Adds `asymmetry`, the mean |x - flip(x)| of the images: what mirroring should raise."""
        x = set.decode()[0].detach()
        return {**self._base.figures(set, problem), "asymmetry": float((x - x.flip(-1)).abs().mean())}
