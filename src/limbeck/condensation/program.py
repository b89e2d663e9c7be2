"""What the engine drives in this wing: one outer step of a condenser after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import schema
from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram, Tick


class CondensationProgram(PlainProgram):
    """A condenser, its set and its problem as an engine program.

    Args:
        method: prepared, see `Condenser.prepare`.
        set: as `Condenser.begin` gave it.
        problem: the real data.
        total: outer steps.
        clip: the greatest gradient norm, or None.
    """

    def __init__(self, method: Condenser, set: SyntheticSet, problem: Problem, total: int, clip: float | None = None) -> None:
        self.method, self.set, self.problem, self.total = method, set, problem, total
        self.steps_per_epoch = max(1, total)
        self.training = schema.Training(steps=total, schedule=method.schedule, warmup=0, clip=clip)  # type: ignore[arg-type]
        self._alarms: list[str] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"set": self.set, **self.method.modules()}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self.method.optimizers(self.set)

    def batches(self, epoch: int, start: int) -> Iterator[Tick]:
        return (Tick() for _ in range(start, self.steps_per_epoch))

    def turns(self, clock: Clock) -> Sequence[str]:
        return self.method.turns(clock)

    def losses(self, turn: str, batch: Tick, clock: Clock) -> dict[str, Tensor]:
        return self.method.losses(turn, self.set, self.problem, clock)

    def after_step(self, clock: Clock) -> None:
        self.method.after_step(self.set, self.problem, clock)

    def memory(self) -> dict[str, Any]:
        return self.method.memory()

    def restore(self, memory: dict[str, Any]) -> None:
        self.method.restore(memory)

    def train(self) -> None:
        self.set.train()

    def vitals(self) -> list[str]:
        """The method's alarms, and images of one class that have become the same."""
        found = self.method.alarms()
        x = self.set.images.detach().flatten(1)
        spread = x.std()
        for c in range(len(self.set.classes)):
            own = x[self.set.labels == c]
            if len(own) > 1 and float(torch.pdist(own[:16]).max()) < 1e-3 * float(spread):
                found.append(f"the images of class {self.set.classes[c]} have become the same")
        return found
