"""The stages of a distillation in turn, and beside them the same stages without a teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from limbeck import processes, schema
from limbeck.data import Batches, Data
from limbeck.engine import sharding
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.distiller import Distiller
from limbeck.knowledge.making import Making
from limbeck.knowledge.methods.alone import Alone
from limbeck.knowledge.program import KnowledgeProgram, steps_of
from limbeck.knowledge.teachers import Teacher
from limbeck.tasks import Task


@dataclass
class Job:
    """What every stage of a run shares.

    Attributes:
        recipe, session, given: see `limbeck.knowledge.job.run`.
        data: as it was opened; `on_device` is the same on the device.
        task: what outputs mean.
        networks: the recipe's teachers by name.
    """

    recipe: schema.Recipe
    data: Data
    on_device: Data
    task: Task
    networks: Mapping[str, nn.Module]
    session: Session
    given: Mapping[str, Any]


@dataclass
class Stage:
    """A finished stage.

    Attributes:
        name: of the stage; "student" where there is one only.
        method: as it was used.
        making: what it was given to make its student; None where it makes none.
        made: the student as the method made it, before training; None likewise, and where the recipe wants no baseline.
        student: as the stage left it.
        training: its `training` block.
        data: what it trained on.
        task: what outputs mean on these data.
        steps: optimiser steps.
    """

    name: str
    method: Distiller
    making: Making | None
    made: nn.Module | None
    student: nn.Module
    training: Any
    data: Data
    task: Task
    steps: int


@dataclass
class Distilled:
    """What came of all stages.

    Attributes:
        job: what they shared.
        start: the student before the first stage.
        stages: in order.
        program: of the last stage.
    """

    job: Job
    start: nn.Module
    program: KnowledgeProgram
    stages: list[Stage] = field(default_factory=list)

    @property
    def student(self) -> nn.Module:
        """The student that came out."""
        return self.stages[-1].student

    @property
    def total(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def phase(self) -> str:
        """The name of the last stage."""
        return self.stages[-1].name

    @property
    def reshaped(self) -> bool:
        """Whether a method made another network of the student."""
        return any(stage.making is not None for stage in self.stages)


def distil(job: Job, start: nn.Module) -> Distilled:
    """Every stage in turn, each with the student that the one before left."""
    recipe, session = job.recipe, job.session
    specs = recipe.stages or [schema.Stage()]
    student, before, program = start, None, None
    opened: dict[str, Data] = {}
    done: list[Stage] = []
    for number, stage in enumerate(specs, 1):
        spec = stage.method or recipe.method
        method = copy.deepcopy(models.make_method(spec, job.given.get("method") if stage.method is None else None))
        training = schema.Training.model_validate({**recipe.training.model_dump(), **stage.training})
        source = stage.teacher or recipe.teacher
        networks = job.networks
        if stage.teacher is not None:
            networks = models.teacher_networks(recipe.model_copy(update={"teacher": source}), job.data, session, {})
        phase = "student" if len(specs) == 1 else stage.name or f"stage-{number}"
        data, steps = (_stage_data(job, stage, opened) if stage.data else job.on_device), None
        task = models.task_of(recipe, data) if stage.data else job.task
        if method.labelled_only and job.data.hidden_labels is not None:
            # the budget is that of methods which see the unlabelled samples too
            data, steps = data.only_labelled(), _steps(training, data, method)
        method.bind(task)
        making = made = None
        network = copy.deepcopy(student)
        if method.reshapes():
            for one in networks.values():
                one.eval().requires_grad_(False)
            making = Making(networks, data, task, training, recipe, session, phase, method)
            network = reshaped(method, network, making)
            made = copy.deepcopy(network) if recipe.baseline else None
        seed_everything(recipe.seed, f"{phase} set-up")
        teacher = models.make_teacher(source, method, _own_copies(source, method, networks, session), network, data, session, task)
        prepared = processes.first_then_others(lambda: method.prepare(data, teacher, session, recipe.seed))  # noqa: B023
        program = make_program(method, network, teacher, prepared, task, training, recipe, session, steps)
        if before is not None and type(before) is type(method):
            method.follow(before)
        before = method
        session.fit(program, phase, seed=recipe.seed)
        student = program.finish()
        done.append(Stage(phase, method, making, made, student, training, data, task, program.total))
    assert program is not None
    return Distilled(job, start, program, done)


def reshaped(method: Distiller, network: nn.Module, making: Making) -> nn.Module:
    """The network that a method makes of the student, on the device; random numbers of the making are its own."""
    seed_everything(making.seed, f"{making.phase} shape")
    return method.reshape(network, making).to(making.device)


def beside(done: Distilled) -> dict[str, nn.Module]:
    """The same stages with labels alone in place of the teacher, for methods that make their own student.

    Every stage makes its network of what the labels alone left, trains it for as many steps on the labels, and finishes it as its method
    does. A stage whose network was made of the same student as the distilled one's is not made twice.

    Returns:
        By role: "baseline", what came out; where there are several stages "<stage> alone" and "<stage>", as each left it; and
        "<stage> made", as the stage made it of the distilled student, before training.
    """
    recipe, session, found = done.job.recipe, done.job.session, {}
    student, same = done.start, True
    for stage in done.stages:
        last, single = stage is done.stages[-1], len(done.stages) == 1
        network = copy.deepcopy(student)
        if stage.making is not None:
            assert stage.made is not None
            own = copy.copy(stage.making)
            own.phase = "baseline" if single else f"baseline-{stage.name}"
            shared = {id(network): network for network in own.teachers.values()}  # a method may hold a teacher, which is not copied
            own.method = method = copy.deepcopy(stage.method, dict(shared))
            method.bind(stage.task)
            network = copy.deepcopy(stage.made) if same else reshaped(method, network, own)
            found["made" if single else f"{stage.name} made"] = _finished(copy.deepcopy(method, dict(shared)), copy.deepcopy(stage.made))
        phase = "baseline" if single else f"baseline-{stage.name}"
        student = alone(phase, network, stage.data.only_labelled(), stage.task, recipe, session, stage.steps, stage.training)
        if stage.making is not None:
            student = _finished(method, student)
        same = False
        if not last:
            found[f"{stage.name} alone"], found[stage.name] = student, stage.student
    return found | {"baseline": student}


def _finished(method: Distiller, network: nn.Module) -> nn.Module:
    """What a method's last word makes of a network that was trained without it."""
    return method.finish(network, None, None).eval()  # type: ignore[arg-type]


def _stage_data(job: Job, stage: schema.Stage, opened: dict[str, Data]) -> Data:
    """The data of a stage that changes some keys of the recipe's; opened once however many stages use it."""
    key = json.dumps(stage.data, sort_keys=True)
    if key not in opened:
        spec = schema.Data.model_validate({**job.recipe.data.model_dump(), **stage.data})
        own = processes.first_then_others(lambda: models.open_recipe_data(spec, None, job.recipe, job.data))
        if own.classes and job.data.classes and own.classes != job.data.classes:
            raise UserError(
                f"stage data {spec.source} has {len(own.classes)} classes that are not those of {job.data.name}",
                "a stage may see other samples, not other classes",
            )
        job.session.digest += own.fingerprint
        opened[key] = own.to(job.session.device)
    return opened[key]


def _steps(training: Any, data: Data, method: Any) -> int:
    """The optimiser steps that a `training` block gives a method on the whole training split."""
    return steps_of(training, Batches(data.train, min(training.batch, len(data.train))).steps_per_epoch)


def _own_copies(spec: schema.Teacher, method: Any, networks: Mapping[str, nn.Module], session: Session) -> Mapping[str, nn.Module]:
    """A teacher that learns must not change the object that the user gave; a sharded one is a copy of a whole one on the processor.

    One that no step reads stays whole: it writes texts before the training, on process 0 alone.
    """
    kind = method.teacher_kind if spec.kind == "auto" else spec.kind
    if processes.sharding() and kind == "frozen":
        if not method.wants()[1]:
            return {name: network.to(session.device) for name, network in networks.items()}
        return {
            name: sharding.shard(copy.deepcopy(network.to("cpu")), session.device, session.precision) for name, network in networks.items()
        }
    if kind != "online":
        return networks
    return {name: copy.deepcopy(network).requires_grad_(True) for name, network in networks.items()}


def make_program(
    method: Any,
    network: nn.Module,
    teacher: Teacher,
    data: Data,
    task: Task,
    training: Any,
    recipe: Any,
    session: Session,
    total: int | None = None,
) -> KnowledgeProgram:
    """A program with what the recipe says of order, augmentation, measuring and device."""
    return KnowledgeProgram(
        method,
        network,
        teacher,
        data,
        task,
        training,
        seed=recipe.seed,
        augment=recipe.data.augment,
        total=total,
        evaluate_on=recipe.evaluation.on,
        evaluate_batch=recipe.evaluation.batch,
        device=session.device,
        precision=session.precision,
    )


def alone(
    phase: str, start: nn.Module, data: Data, task: Task, recipe: Any, session: Session, total: int, training: Any = None
) -> nn.Module:
    """The same first weights, steps and optimiser settings, on labels alone."""
    training = (training or recipe.training).model_copy(update={"labelled_share": None})
    program = make_program(Alone(), copy.deepcopy(start), Teacher(), data, task, training, recipe, session, total)
    session.fit(program, phase, seed=recipe.seed)
    return program.finish()
