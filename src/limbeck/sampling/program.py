"""What the engine drives in this wing: one step of a few-step method after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser
from limbeck.engine import checkpoint
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram, Tick, moving_average, placed
from limbeck.sampling.few_step import FewStep, Pair

COLLAPSED = 0.1
"""A generated batch whose pictures differ by less than this share of what real ones differ by raises the alarm."""


class SamplingProgram(PlainProgram):
    """A method, its student and its critics as an engine program.

    Args:
        method: a fresh instance; bound and set up here.
        pair: its job.
    """

    def __init__(self, method: FewStep, pair: Pair) -> None:
        self.method, self.pair, self.training, self.total = method, pair, pair.training, pair.total
        processes.check_even(pair.training.batch)
        method.bind(pair)
        method.setup(pair)
        method.parts.to(pair.device)
        self._batches = None if not method.needs_pictures() else pair.pictures.batches(pair.training.batch, pair.seed)
        self.steps_per_epoch = pair.total if self._batches is None else self._batches.steps_per_epoch
        self._optimizers = method.optimizers(pair)
        self.average = moving_average(pair.student.network, pair.training)
        self._spread: float | None = None
        if pair.spec.compile:
            pair.student.network.compile()  # in place: the same module with the same names, only its call is another

    def modules(self) -> dict[str, nn.Module]:
        """Student, the method's parts, and the moving average."""
        found: dict[str, nn.Module] = {"student": self.pair.student.network, "parts": self.method.parts}
        return found if self.average is None else {**found, "average": self.average}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self._optimizers

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        if self._batches is None:
            return (Tick() for _ in range(start, self.steps_per_epoch))
        return (self.pair.pictures.ready(batch) for batch in self._batches.epoch(epoch, start))

    def turns(self, clock: Clock) -> Sequence[str]:
        return self.method.turns(clock)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        return self.method.losses(turn, batch, clock)

    def after_step(self, clock: Clock) -> None:
        self.method.after_step(clock)
        if self.average is not None:
            self.average.update_parameters(self.pair.student.network)

    def memory(self) -> dict[str, Any]:
        return {"state": self.method.state}

    def restore(self, memory: dict[str, Any]) -> None:
        self.method.state = placed(memory["state"], self.pair.device)

    def vitals(self) -> list[str]:
        """The method's alarms, and a generator whose pictures have become alike."""
        found = self.method.alarms()
        made = self.method.made
        if made is not None and len(made) > 7:
            if self._spread is None:
                state = checkpoint.random_state()  # looking must not change what is drawn next
                self._spread = _spread(self.pair.pictures.random(256)[0])
                checkpoint.restore_random_state(state)
            if _spread(made) < COLLAPSED * self._spread:
                found.append(f"collapse: the generated pictures of a batch differ less than {COLLAPSED:.0%} as much as real ones do")
        return found

    def denoiser(self) -> Denoiser:
        """The student as it is measured and kept: the moving average where there is one."""
        network = self.pair.student.network if self.average is None else self.average.module
        return self.pair.student.with_network(network.eval())


def _spread(x: Tensor) -> float:
    """Standard deviation over samples, root mean square over pixels."""
    return float(x.flatten(1).float().var(0).mean().sqrt())
