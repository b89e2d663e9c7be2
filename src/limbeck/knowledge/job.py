"""A whole job of the knowledge wing: teacher, student, the student alone, the ceiling, and what each of them is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from limbeck import processes
from limbeck import recipe as schema
from limbeck.data import Data
from limbeck.data.batch import UNLABELLED
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.evaluation.agreement import agreement
from limbeck.knowledge import models
from limbeck.knowledge.program import check_family
from limbeck.knowledge.stages import Job, alone, beside, distil
from limbeck.knowledge.teachers import EnsembleTeacher, FrozenTeacher, Teacher
from limbeck.knowledge.text_report import TextStudent, text_outcome
from limbeck.knowledge.tokens import in_own_tokens
from limbeck.outcome import Outcome
from limbeck.report.tables import NAMES
from limbeck.signals.store import model_fingerprint
from limbeck.tasks import Task

CEILING_NOTE = (
    "The same student and budget, but with the label of every training sample: what the student could reach if nothing were hidden. "
    "Neither the distilled student nor the student alone saw those labels."
)

FOREIGN_NOTE = "The teacher reads other tokens than the student: its nats a token do not compare with the student's, bits a byte do."


def run(recipe: schema.Recipe, session: Session, given: Mapping[str, Any]) -> Outcome:
    """Distil as the recipe says, train what it is compared with, and measure everything on the test split.

    Args:
        recipe: checked.
        session: device, folder, callbacks.
        given: Python objects that stand in for the recipe's references: "teacher", "student", "data", "method".
    """
    data = processes.first_then_others(lambda: models.open_recipe_data(recipe.data, given.get("data"), recipe))
    task = models.task_of(recipe, data)
    _check(recipe, data, task, session, given)
    networks = models.teacher_networks(recipe, data, session, given)
    session.digest += data.fingerprint
    if cut := getattr(data.train, "cut", 0):
        most = f"text.length {data.input_shape[0]}" if data.input_shape else "text.length"
        session.notes.append(f"{cut} of {len(data.train)} training texts lost tokens: they do not fit into {most} (or text.prompt_length)")
    if "teacher" in given:  # an object has no reference that the recipe could bind a checkpoint to; its weights are what binds
        session.digest += "".join(model_fingerprint(network) for network in networks.values())
    on_device = data.to(session.device)
    start = models.make_student(recipe, data, session, given)
    done = distil(Job(recipe, data, on_device, task, networks, session, given), start)
    program = done.program
    for network in networks.values():
        network.to(session.device)

    found: dict[str, nn.Module | Teacher] = {}
    if networks and isinstance(program.teacher, EnsembleTeacher):
        found["teacher"] = program.teacher
    elif program.teacher.learning():
        found["teacher"] = next(iter(program.teacher.learning().values()))
    elif networks:
        found["teacher"] = (
            next(iter(networks.values()))
            if len(networks) == 1
            else EnsembleTeacher({name: FrozenTeacher(network, read=task.reader) for name, network in networks.items()})
        )
    if recipe.baseline and done.reshaped:
        found |= beside(done)  # the same structure after every stage, with labels alone
    elif recipe.baseline:
        found["baseline"] = alone("baseline", start, on_device.only_labelled(), task, recipe, session, done.total)
    found["student"] = done.student
    if recipe.ceiling:
        if data.hidden_labels is None:
            session.notes.append("ceiling: no label is hidden, so the student alone is its own ceiling")
        else:
            found["ceiling"] = alone("ceiling", start, on_device.with_all_labels(), task, recipe, session, done.total)
    foreign = None
    if any(hasattr(network, "limbeck_text") for network in networks.values()):
        foreign = in_own_tokens(next(iter(recipe.teacher.models.values())), recipe, data, given.get("data"))[1]
    return _measure(found, program.method, on_device, task, recipe, session, done.phase, foreign)


def _check(recipe: schema.Recipe, data: Data, task: Task, session: Session, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be, before anything is trained."""
    watched = recipe.evaluation
    if (watched.patience or watched.every) and watched.on == "valid" and data.valid is None:
        what = "patience" if watched.patience else "every"
        raise UserError(f"evaluation.{what} needs a validation split, and there is none", "set data.valid, for example data.valid=0.1")
    if recipe.precision == "fp16" and session.device.type == "cpu":
        raise UserError("precision fp16 needs a GPU, and this run is on the processor", "set precision=bf16 or precision=no")
    for stage in recipe.stages or [schema.Stage()]:  # before anything is trained
        if not stage.data:
            made = models.make_method(stage.method or recipe.method, given.get("method") if stage.method is None else None)
            check_family(made, task)


class _Whole(nn.Module):
    """Several teachers as one network, so that their cost is counted together."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks.values())

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [member(*args, **kwargs) for member in self.members]


def _measure(
    found: Mapping[str, nn.Module | Teacher],
    method: Any,
    data: Data,
    task: Task,
    recipe: Any,
    session: Session,
    phase: str,
    foreign: Data | None = None,
) -> Outcome:
    costs: dict[str, dict[str, Any]] = {}
    if recipe.evaluation.final == "valid":
        if data.valid is None:
            raise UserError("evaluation.final is valid, and there is no validation split", "set data.valid, for example data.valid=0.2")
        data = replace(data, test=data.valid)
    example = data.example(1).to(session.device)
    views = {role: method.for_measuring(data) if role == "student" else data for role in found}
    tasks, examples = dict.fromkeys(found, task), dict.fromkeys(found, example)
    if "teacher" in found and foreign is not None:
        # a teacher with a tokenizer of its own is measured on its own tokens: of its figures those per byte compare
        views["teacher"], tasks["teacher"] = foreign, models.task_of(recipe, foreign)
        if recipe.evaluation.final == "valid":
            views["teacher"] = replace(foreign, test=foreign.valid)
        examples["teacher"] = foreign.example(1).to(session.device)
    measured = {
        role: tasks[role].measure(model, views[role].test, recipe.evaluation.batch, session.device, full=True)
        for role, model in found.items()
    }
    metrics = {role: said.metrics for role, said in measured.items()}
    if not metrics["student"]:
        raise UserError(f"the test part of {data.name} has no labels, so nothing can be measured", "give a labelled test split (data.test)")
    for role, model in found.items():
        network = model if isinstance(model, nn.Module) else _Whole(model.networks())
        if recipe.evaluation.attack is not None and isinstance(model, nn.Module):
            metrics[role] |= _attacked(model, data, task, metrics[role], recipe, session)
        if role in ("teacher", "student") or method.reshapes():
            costs[role] = tasks[role].price(network, examples[role])
    student = found["student"]
    assert isinstance(student, nn.Module)
    metrics["student"] |= method.figures(student, views["student"], task, session.device)
    summary: dict[str, Any] = {"method": method.card.id, "wing": "knowledge", "metrics": metrics, "primary": task.primary, "cost": costs}
    summary["data"] = data.describe()
    if foreign is not None:
        summary["notes"] = {"teacher": FOREIGN_NOTE}
    if "ceiling" in metrics:
        summary.setdefault("notes", {})["ceiling"] = CEILING_NOTE
    if task.family in ("language", "embedding"):
        if "teacher" in found and foreign is None:
            near = {
                role: task.compare(found[role], found["teacher"], data.test, recipe.evaluation.batch, session.device)
                for role in ("baseline", "student")
                if role in found
            }
            if any(near.values()):
                summary["to_teacher"] = near
        return text_outcome(student, summary, measured, task, data, phase)
    if task.family == "denoising":
        if "teacher" in found:
            for role, model in found.items():
                if role != "teacher":
                    metrics[role] |= task.compare(model, found["teacher"], data.test, recipe.evaluation.batch, session.device)
        return Outcome({"student": student}, summary, classes=data.classes)
    logits = {role: said.logits for role, said in measured.items() if role in NAMES}
    if "teacher" in logits:
        summary["agreement"] = agreement(logits["student"], logits["teacher"])
    inputs, labels = None, measured["student"].labels
    if data.images and len(data.test) <= 100_000:
        inputs = data.test.batch(torch.arange(len(data.test))).inputs.cpu()
    flat = labels if labels.ndim == 1 else torch.full((len(labels),), UNLABELLED)
    kept = student if data.text is None else TextStudent(student, data.text.tokenizer)
    return Outcome({"student": kept}, summary, logits, flat, inputs, data.classes)


def _attacked(
    model: nn.Module, data: Data, task: Task, metrics: Mapping[str, float], recipe: Any, session: Session
) -> dict[str, float]:
    from limbeck.knowledge.views import robust_accuracy

    attack = recipe.evaluation.attack
    robust = robust_accuracy(
        model,
        data.test,
        task,
        attack.eps,
        attack.step,
        attack.steps,
        batch=recipe.evaluation.batch,
        device=session.device,
        seed=recipe.seed,
    )
    return {"robust_accuracy": robust, "weighted_accuracy": (robust + metrics["accuracy"]) / 2}
