"""What a method that makes its own student is given: teacher, data, budget, and the means to train and to measure on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck import processes, schema, storage
from limbeck.data.batch import Batch
from limbeck.data.data import Data
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.evaluation.budget import MEASURED, Budget
from limbeck.knowledge.distiller import Distiller
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher, Teacher
from limbeck.tasks import Task


@dataclass
class Making:
    """The job as `Distiller.reshape` sees it.

    Attributes:
        teachers: the teacher networks by name, on the device; not to be changed.
        data: what the student is trained on; on the device where it is held in memory.
        task: what outputs mean.
        training: the `training` block of this stage.
        recipe: the whole recipe.
        session: device, folder, notes.
        phase: the name of the stage in the log ("student", or that of the stage).
        method: the method of the stage.
    """

    teachers: Mapping[str, nn.Module]
    data: Data
    task: Task
    training: Any
    recipe: schema.Recipe
    session: Session
    phase: str
    method: Distiller

    @property
    def teacher(self) -> nn.Module:
        """The one teacher.

        Raises:
            UserError: there is none, or there are several.
        """
        if len(self.teachers) != 1:
            raise UserError(f"{self.method.card.id} needs one teacher, and there are {len(self.teachers) or 'none'}", "name one teacher")
        return next(iter(self.teachers.values()))

    @property
    def example(self) -> Batch:
        """A small batch on the device."""
        return self.data.example(min(len(self.data.train), self.task.example_size())).to(self.device)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.recipe.seed

    @property
    def device(self) -> torch.device:
        """Where everything lives."""
        return self.session.device

    def cost(self, network: nn.Module) -> dict[str, Any]:
        """What a network costs, measured on one sample; see `limbeck.evaluation.cost.Cost`."""
        return self.task.price(network, self.data.example(1).to(self.device))

    @property
    def budget(self) -> Budget | None:
        """The recipe's budget in absolute figures (shares are of the one teacher's).

        Raises:
            UserError: shares, and there is no teacher or several.
        """
        spec = self.recipe.structure.budget if self.recipe.structure is not None else {}
        if not spec:
            return None
        shares = any(isinstance(value, str) and value.strip().endswith("%") for value in spec.values())
        if shares and len(self.teachers) != 1:
            raise UserError("a budget in shares is of one teacher", "give structure.budget in numbers")
        reference = self.cost(self.teacher) if len(self.teachers) == 1 else dict.fromkeys(MEASURED.values(), 1.0)
        return Budget.of(spec, reference)

    def decided(self, what: str, make: Callable[[], Any]) -> Any:
        """A decision on the way (a ratio found by timing, the genes of a search), kept in the run's folder for when the run is resumed.

        Args:
            what: its name.
            make: makes it; JSON must hold what it returns.
        """
        if self.session.folder is None:
            return processes.told(make())
        path = self.session.folder / "decisions" / f"{self.phase}-{what}.json"
        mark = storage.fingerprint([self.session.digest, self.method.values()])
        kept = processes.first(lambda: path.read_text("utf-8") if path.is_file() else None)
        if kept is not None:
            try:
                found = json.loads(kept)
                if found["digest"] == mark:
                    return found["decision"]
            except (ValueError, TypeError, KeyError):
                self.session.notes.append(f"{path.name} cannot be read and is decided again")
        decision = processes.told(json.loads(json.dumps(make())))  # every process makes it, because training on the way takes all of them
        processes.first(lambda: storage.write_json(path, {"digest": mark, "decision": decision}))
        return decision

    def fit(
        self, method: Distiller, student: nn.Module, what: str, *, training: Any = None, total: int | None = None, taught: bool = False
    ) -> nn.Module:
        """Train a network on the way, through the engine; an interrupted run finds it finished, or goes on with it.

        Args:
            method: a loss, and whatever else it says of a step.
            student: trained in place.
            what: the name of this training in the log, after the stage's.
            training: a `training` block instead of the stage's.
            total: optimiser steps instead of what `training` says.
            taught: let `method` learn from the teacher; else from labels alone.

        Returns:
            The trained network in evaluation mode, after the method's `finish`.
        """
        phase = f"{self.phase}-{what}"
        teacher = FrozenTeacher(self.teacher, method.wants()[1], read=self.task.reader) if taught else Teacher()
        seed_everything(self.seed, f"{phase} set-up")
        program = KnowledgeProgram(
            method,
            student,
            teacher,
            self.data,
            self.task,
            training or self.training,
            seed=self.seed,
            augment=self.recipe.data.augment,
            total=total,
            device=self.device,
            precision=self.session.precision,
        )
        self.session.fit(program, phase, seed=self.seed, evaluate=False)
        return program.finish()
