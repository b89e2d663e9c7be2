"""What the engine drives in this wing: one step of a scene method after another, and the curve over time beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.engine import checkpoint
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram, Tick, moving_average, placed
from limbeck.engine.session import Session, seed_everything
from limbeck.scenes.scene_method import Problem, SceneMethod

PHASE = "student"
"""The phase of the log in which the scene is optimised."""


class SceneProgram(PlainProgram):
    """A method, its student and its parts as an engine program.

    Args:
        method: a fresh instance; bound and set up here.
        problem: its job.
        curve: how many times the student is looked at while it is optimised, at equal distances; 0 for never.

    Attributes:
        trace: one row a look: step, seconds of optimising so far (looking not counted), figures.
    """

    def __init__(self, method: SceneMethod, problem: Problem, curve: int = 0) -> None:
        self.method, self.problem, self.training, self.total = method, problem, problem.training, problem.total
        method.bind(problem)
        method.setup(problem)
        method.parts.to(problem.device)
        self.steps_per_epoch = problem.total
        self._optimizers = method.optimizers(problem)
        self.average = moving_average(problem.student, problem.training)
        self._looks = {round(problem.total * (number + 1) / curve) for number in range(curve)}
        self.trace: list[dict[str, float]] = []
        self._before = 0.0
        self._since: float | None = None

    def modules(self) -> dict[str, nn.Module]:
        """Student, the method's parts, and the moving average."""
        found: dict[str, nn.Module] = {"student": self.problem.student, "parts": self.method.parts}
        return found if self.average is None else {**found, "average": self.average}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self._optimizers

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        return (Tick() for _ in range(start, self.steps_per_epoch))

    def turns(self, clock: Clock) -> Sequence[str]:
        return self.method.turns(clock)

    def train(self) -> None:
        """Every module into training mode; the clock of the curve starts with the first step."""
        super().train()
        self._since = time.perf_counter()

    def losses(self, turn: str, batch: Any, clock: Clock) -> dict[str, Tensor]:
        return self.method.losses(turn, clock)

    @property
    def seconds(self) -> float:
        """Seconds of optimising so far, over all sittings, looks not counted."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    def stop(self) -> None:
        """The clock of the curve stops: what comes after the last step is no optimising."""
        self._before, self._since = self.seconds, None

    def after_step(self, clock: Clock) -> None:
        self.method.after_step(clock)
        if self.average is not None:
            self.average.update_parameters(self.problem.student)
        if clock.step + 1 in self._looks:
            self._look(clock.step + 1)

    def _look(self, step: int) -> None:
        seconds = self.seconds
        random = checkpoint.random_state()  # looking must not change what is drawn next
        figures = self.problem.watch(self.student())
        checkpoint.restore_random_state(random)
        self.problem.student.train()
        if figures:
            self.trace.append({"step": step, "seconds": seconds, **figures})
        self._before, self._since = seconds, time.perf_counter()

    def memory(self) -> dict[str, Any]:
        return {"state": self.method.state, "trace": self.trace, "seconds": self.seconds}

    def restore(self, memory: dict[str, Any]) -> None:
        self.method.state = placed(memory["state"], self.problem.device)
        self.trace, self._before = list(memory["trace"]), memory["seconds"]

    def vitals(self) -> list[str]:
        return self.method.alarms()

    def student(self) -> nn.Module:
        """The student as it is measured and kept: the moving average where there is one."""
        return (self.problem.student if self.average is None else self.average.module).eval()


def optimise(method: SceneMethod, problem: Problem, session: Session, phase: str = PHASE, curve: int = 0, **where: Any) -> SceneProgram:
    """Set a method up and run it through the engine; goes on where an earlier sitting stopped.

    Args:
        method: it is changed; give a copy.
        phase: its name in log and checkpoints.
        curve: see `SceneProgram`.
        where: `folder` and `digest` of `Session.fit`, for what is kept outside the run.

    Returns:
        the program: `method.finish(program.student())` is the result.
    """
    seed_everything(problem.seed, f"{method.card.id} set-up")
    program = SceneProgram(method, problem, curve)
    session.fit(program, phase, seed=problem.seed, evaluate=False, **where)
    program.stop()
    return program
