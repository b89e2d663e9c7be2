"""The contract of this wing: what a method that optimises a scene may say. The first file to read before writing one.

One dataclass is one published method; the engine drives it through `SceneProgram`, one step after another. There is one `Problem` class
for each kind of scene, made by one module for each kind (`KINDS`):

- "field": a radiance field is turned into another one. The teacher is a field, the data are pictures with known cameras.
- "picture": whatever renders pictures (pixels, a generator, a field) is optimised under a score model. The teacher is a
  `limbeck.diffusion.Denoiser`, the data are pictures of what may come out.
- "paths": the same for drawings made of closed curves.

A module of a kind offers three functions:

    open_problem(recipe, method, session, given) -> Problem
        everything opened: data, teacher (trained and kept if need be), student
    conclude(recipe, method, problem, student, program, session) -> Outcome
        rivals, measurements, table, `{"scene": Scene(...)}` as artifacts; `program.trace` is the curve of `Problem.watch` over the steps
    measure_again(recipe, network, session) -> dict[str, float]
        figures of a saved scene, for `limbeck evaluate`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck import schema
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.method import Method

KINDS = {
    "field": "limbeck.scenes.fields_job",
    "picture": "limbeck.scenes.pictures_job",
    "paths": "limbeck.scenes.pictures_job",
}
"""Where each kind of scene is opened, measured and compared."""


@dataclass
class Problem:
    """What is optimised and everything around it, as a method's `setup` sees it. Each kind of scene derives its own from it.

    A problem of the kinds "picture" and "paths" has a student with `variants: int` and a differentiable
    `render(pick: Tensor) -> Tensor`: `(B,)` int64 numbers of particles or cameras below `variants` give `(B, C, H, W)` in [-1, 1].

    Attributes:
        student: what is optimised, on `device`; any module.
        teacher: what is learned from, frozen; None for methods that need none. A field, or a `Denoiser`.
        spec: the recipe's `scene` block.
        training: its `training` block.
        total: steps to come.
        device, seed: of the run.
        session: for parts that a method trains beforehand (`session.fit`, `limbeck.models.kept`).
    """

    student: nn.Module
    teacher: Any
    spec: schema.Scene
    training: Any
    total: int
    device: torch.device
    seed: int = 0
    session: Session = field(default_factory=Session)

    def watch(self, student: nn.Module) -> dict[str, float]:
        """Figures for the curve over time, of the student as it is now; cheap, without random numbers. Empty for no curve."""
        return {}


@dataclass
class SceneMethod(Method):
    """A method that optimises a scene. A subclass is a dataclass with a `card`, a `kind` and `losses`.

    Class attributes:
        kind: a name of `KINDS`.
        needs_teacher: whether the recipe must name one.
        contract: settings with which the contract test is quick; its key "recipe" may change keys of the small recipe that the test
            takes for this kind (`{"scene.variants": 2}`); nothing else reads them.

    Attributes:
        problem: what it was set up for.
        parts: modules beside the student (a fake score, an encoder), saved in checkpoints and then thrown away.
        state: tensors and plain data between steps (pools, averages), saved in checkpoints.
    """

    kind: ClassVar[str] = "field"
    needs_teacher: ClassVar[bool] = True
    contract: ClassVar[Mapping[str, Any]] = {}

    def bind(self, problem: Problem) -> None:
        """Start afresh for a new job; called before `setup`.

        Raises:
            UserError: the method lacks something that it needs.
        """
        self.problem = problem
        self.parts = nn.ModuleDict()
        self.state: dict[str, Any] = {}
        if self.needs_teacher and problem.teacher is None:
            raise UserError(f"{self.card.id} learns from a teacher, and the recipe names none", "add a `teacher` block")

    # ---- what a method may override ----

    def setup(self, problem: Any) -> None:
        """Build `parts` and `state`. Random numbers come from torch's global generator, which is seeded before."""

    def optimizers(self, problem: Any) -> dict[str, torch.optim.Optimizer]:
        """One optimiser for each turn; by default the student's alone, as the recipe's `training` block says."""
        return {"student": make_optimizer(problem.training, self.groups(problem))}

    def groups(self, problem: Any) -> list[Any]:
        """Parameters of the student, or torch parameter groups with rates of their own."""
        return [p for p in problem.student.parameters() if p.requires_grad]

    def turns(self, clock: Clock) -> Sequence[str]:
        """Whose turn it is in this step, in order: names of optimisers, such as ("student", "fake")."""
        return ("student",)

    def losses(self, turn: str, clock: Clock) -> dict[str, Tensor]:
        """The terms of one turn by name: scalars that the engine sums and back-propagates.

        There is no batch: a method draws cameras, rays, particles, noise and times from torch's global generator, which checkpoints
        restore. What the student's turn rendered may be kept (`self.made = x.detach()`) for a turn that follows in the same step.
        """
        raise NotImplementedError

    def after_step(self, clock: Clock) -> None:
        """After the optimisers: averages, pools."""

    def alarms(self) -> list[str]:
        """What the log should warn of since the last time, each one line."""
        return []

    def finish(self, student: nn.Module) -> nn.Module:
        """The student that is kept.

        Args:
            student: the optimised one (the moving average where there is one), in evaluation mode.
        """
        return student

    def figures(self, student: nn.Module) -> dict[str, float]:
        """Further figures of the finished student for the summary (what a mechanism claims)."""
        return {}
