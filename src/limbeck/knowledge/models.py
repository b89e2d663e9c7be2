"""From what a recipe says to networks and teachers: building, loading, and training a teacher once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import __version__, places, storage, zoo
from limbeck import method as registry
from limbeck import recipe as schema
from limbeck.data import Data
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import (
    EndpointTeacher,
    EnsembleTeacher,
    FrozenTeacher,
    HistoryTeacher,
    MovingAverageTeacher,
    OnlineTeacher,
    StoredLanguageTeacher,
    StoredTeacher,
    Teacher,
)
from limbeck.knowledge.tokens import check_student_tokens, check_tokens, in_own_tokens
from limbeck.models import build, check_input, kept, open_recipe_data, task_of
from limbeck.signals.store import Store, model_fingerprint
from limbeck.tasks import Task


def make_method(spec: schema.Method, given: Any = None) -> Distiller:
    """The method of a recipe, checked to belong to this wing."""
    return registry.of_wing(spec.id, spec.settings, given, Distiller, "knowledge")


def school_data(spec: schema.Model, recipe: schema.Recipe, data: Data, given: Any = None) -> Data:
    """The data that a `train` block trains on: the recipe's, with the keys changed that the block changes."""
    if spec.train is None or not spec.train.data:
        return data
    own = open_recipe_data(schema.Data.model_validate({**recipe.data.model_dump(), **spec.train.data}), given, recipe, data)
    if own.classes and data.classes and own.classes != data.classes:
        raise UserError(
            f"train.data {own.name} has {len(own.classes)} classes that are not those of {data.name}",
            "a model may be trained on other samples, not on other classes",
        )
    return own


def kept_at(spec: schema.Model, network: nn.Module, recipe: schema.Recipe, own: Data, session: Session) -> tuple[Path, dict[str, Any]]:
    """The folder of the user's cache in which a network trained as its `train` block says is kept, and what it is made from.

    Args:
        spec: the model, with its `train` block.
        network: as it is before that training.
        recipe: the recipe that names it.
        own: what it is trained on, see `school_data`.
        session: device and precision.
    """
    school = spec.train
    assert school is not None
    content = {
        "model": spec.model_dump(exclude={"train"} if spec.text else {"train", "text"}),
        "start": storage.tensors_fingerprint(network.state_dict()),
        "train": {k: v for k, v in school.model_dump().items() if k != "data"},
        "method": make_method(school.method).values(),
        "data": own.fingerprint,
        "augment": school.data.get("augment", recipe.data.augment),
        # what a loss against labels depends on beyond the data; as it stands in most recipes it leaves older keys as they are
        **({"task": [recipe.task, recipe.label_smoothing]} if recipe.task != "auto" or recipe.label_smoothing else {}),
        "limbeck": __version__,
        "device": session.device.type,
        "precision": session.precision,
    }
    return places.cache_folder() / "models" / storage.fingerprint(content), content


def schooled(
    spec: schema.Model, network: nn.Module, recipe: schema.Recipe, data: Data, session: Session, phase: str, given_data: Any = None
) -> nn.Module:
    """Train a network as its `train` block says, once: the result is kept in the user's cache and found again by what it was made from.

    An interrupted training goes on from its checkpoint, also in another run.
    """
    school, method = spec.train, make_method(spec.train.method) if spec.train else None
    assert school is not None and method is not None
    if school.first is not None:
        before = spec.model_copy(update={"train": school.first})
        network = schooled(before, network, recipe, data, session, f"{phase}-first", given_data)
    own = school_data(spec, recipe, data, given_data)
    if own.text is not None:  # before it learns: whether its output matrix says all of its logits decides what it learns
        check_input(network.to(session.device), own, session, "student" if phase.startswith("start") else "teacher")
    _, content = kept_at(spec, network, recipe, own, session)

    def train(work: Path, key: str) -> nn.Module:
        program = KnowledgeProgram(
            method,
            network.to(session.device),
            Teacher(),
            own.to(session.device),
            task_of(recipe, own),
            school,
            seed=school.seed,
            augment=school.data.get("augment", recipe.data.augment),
            device=session.device,
            precision=session.precision,
        )
        session.fit(program, phase, seed=school.seed, folder=work, digest=key, evaluate=False)
        return program.finish()

    return kept(content, network, session, phase, train)


def teacher_networks(recipe: schema.Recipe, data: Data, session: Session, given: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Every teacher network that the recipe names, by name: given as an object, loaded, or trained once.

    One that reads other tokens than the data's carries its `Text` as `limbeck_text`.
    """
    own: dict[str, Data] = {}
    if "teacher" in given:
        value = given["teacher"]
        found = (
            dict(value)
            if isinstance(value, Mapping)
            else {f"teacher{i}": m for i, m in enumerate(value, 1)}
            if isinstance(value, (list, tuple))
            else {"teacher": value}
        )
    else:
        found = {}
        for name, spec in recipe.teacher.models.items():
            role = "teacher" if len(recipe.teacher.models) == 1 else f"teacher {name}"
            own_recipe, own[name] = in_own_tokens(spec, recipe, data, given.get("data"))
            network = build(spec, own[name], spec.train.seed if spec.train else 0, role)
            if spec.train and recipe.teacher.kind != "online":
                phase = "teacher" if len(recipe.teacher.models) == 1 else f"teacher-{name}"
                network = schooled(spec, network, own_recipe, own[name], session, phase, given.get("data"))
            if own[name] is not data:
                network.limbeck_text = own[name].text  # type: ignore[assignment]
            found[name] = network
    for name, network in found.items():
        network.to(session.device)
        check_input(network, own.get(name, data), session, "teacher" if len(found) == 1 else f"teacher {name}")
    return found


def make_teacher(
    spec: schema.Teacher, method: Distiller, networks: Mapping[str, nn.Module], student: nn.Module, data: Data, session: Session, task: Task
) -> Teacher:
    """The teacher that a recipe and its method ask for.

    Raises:
        UserError: a teacher is missing, has the wrong name, or its kind does not fit.
    """
    kind = spec.kind if spec.kind != "auto" else "stored" if spec.store else "endpoint" if spec.endpoint else method.teacher_kind
    wants = method.wants()[1]
    if kind == "none":
        return Teacher()
    read = task.reader
    if kind == "endpoint":
        return endpoint_teacher(spec, method)
    if kind == "history":
        if task.family != "classification":
            raise UserError(f"a teacher of kind history is for classification, and this is a {task.kind} task", "use kind ema or frozen")
        return HistoryTeacher(len(data.train), len(data.classes), session.device)
    if kind == "ema":
        return MovingAverageTeacher(student, spec.decay, wants, read=read)
    if method.teacher_names and kind != "frozen":
        raise UserError(
            f"{method.card.id} needs the teachers {' and '.join(method.teacher_names)} themselves, not kind {kind}",
            "leave teacher.kind and teacher.store out",
        )
    if kind == "stored":
        check_tokens(networks, data)
        return stored_teacher(spec, networks, data, wants, task)
    if not networks:
        raise UserError(
            f"{method.card.id} needs a teacher, and the recipe names none",
            "set `teacher`, for example --set teacher=cnn, or kind: ema or history",
        )
    if method.teacher_names and set(networks) != set(method.teacher_names):
        raise UserError(
            f"{method.card.id} needs teachers named {' and '.join(method.teacher_names)}; the recipe has {', '.join(networks)}",
            "write `teacher: {models: {" + ": ..., ".join(method.teacher_names) + ": ...}}`",
        )
    if not method.bridges:
        check_tokens(networks, data)
    foreign = [text for network in networks.values() if (text := getattr(network, "limbeck_text", None)) is not None]
    if foreign:
        if len(networks) > 1:
            raise UserError(f"{len(networks)} teachers do not all read the student's tokens", "leave one teacher")
        read = replace(task, text=foreign[0]).reader  # type: ignore[type-var]
    if kind == "online":
        if len(networks) > 1:
            raise UserError(f"an online teacher is one network, the recipe names {len(networks)}", "leave one")
        return OnlineTeacher(next(iter(networks.values())), wants, read=read)
    frozen = {name: FrozenTeacher(network, wants, read=read) for name, network in networks.items()}
    if len(frozen) == 1 and not method.teacher_names:
        return next(iter(frozen.values()))
    return EnsembleTeacher(frozen, spec.weights)


def endpoint_teacher(spec: schema.Teacher, method: Distiller) -> Teacher:
    """A remote teacher that writes texts.

    Raises:
        UserError: no endpoint is named, or the method wants more than texts.
    """
    if spec.endpoint is None:
        raise UserError("teacher.kind is endpoint, and teacher.endpoint is empty", "set teacher.endpoint.base_url and .model")
    if not method.black_box:
        raise UserError(
            f"{method.card.id} needs more than a teacher's texts, and an endpoint gives texts only",
            "use a black-box method: sequence-kd or distilling-step-by-step",
        )
    return EndpointTeacher(spec.endpoint)


def stored_teacher(
    spec: schema.Teacher, networks: Mapping[str, nn.Module], data: Data, wants: tuple[str, ...], task: Task
) -> StoredTeacher | StoredLanguageTeacher:
    """Outputs on disk, checked against the teacher (where it is at hand) and the data."""
    if not spec.store:
        raise UserError(
            "teacher.kind is stored, but teacher.store names no folder",
            "write one with `limbeck cache RECIPE`, then set teacher.store to it",
        )
    if data.train.augment is not None:
        raise UserError(
            "stored teacher outputs belong to inputs as they are, and data.augment changes them",
            "leave data.augment empty, or use the teacher itself",
        )
    store = Store(spec.store, teacher_fingerprint=teacher_fingerprint(networks, spec.weights), data_fingerprint=data.fingerprint)
    if task.family == "language":
        return StoredLanguageTeacher(store, data.train, task)
    return StoredTeacher(store, wants)


def teacher_fingerprint(networks: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None) -> str | None:
    """What stored outputs are bound to: one network's fingerprint; of several a digest of every member's, in order, with its share.

    None when no network is at hand: then nothing can be compared.
    """
    marks = [model_fingerprint(network) for network in networks.values()]
    if len(marks) < 2:
        return marks[0] if marks else None
    given = [1.0 if weights is None else weights.get(name, 0.0) for name in networks]
    return storage.fingerprint([[mark, share / (sum(given) or 1.0)] for mark, share in zip(marks, given)])


def as_teacher(recipe: schema.Recipe, data: Data, session: Session, given: Mapping[str, Any]) -> nn.Module:
    """A student that begins as the teacher itself (`student: teacher`), for methods that change a network without making another.

    Raises:
        UserError: there is not one teacher network to copy, or the student's block says what it is built from.
    """
    spec = recipe.student
    if spec.args or spec.weights:
        raise UserError("student: teacher is the teacher as it is; student.args and student.weights say something else", "leave them out")
    networks = teacher_networks(recipe, data, session, given)
    if len(networks) != 1:
        raise UserError(f"student: teacher needs one teacher network, and there are {len(networks)}", "name one teacher")
    student = copy.deepcopy(next(iter(networks.values()))).requires_grad_(True)
    return student if spec.adapter is None else zoo.adapt(student, **spec.adapter.model_dump(), kind=data.kind)


def make_student(recipe: schema.Recipe, data: Data, session: Session, given: Mapping[str, Any]) -> nn.Module:
    """The student as it is before the distillation begins (a given object is copied, never changed)."""
    if "student" in given:
        student = copy.deepcopy(given["student"])
    else:
        if recipe.student.model == "teacher":
            student = as_teacher(recipe, data, session, given)
        else:
            check_student_tokens(recipe.student, data)
            student = build(recipe.student, data, recipe.seed, "student")
        if recipe.student.train:
            spec = recipe.student.model_copy(update={"train": recipe.student.train.model_copy(update={"seed": recipe.seed})})
            student = schooled(spec, student, recipe, data, session, "start", given.get("data"))
    student.to(session.device)
    check_input(student, data, session, "student")
    if recipe.student.adapter is not None:
        return student  # only its adapters learn
    return student.requires_grad_(True) if not any(p.requires_grad for p in student.parameters()) else student
