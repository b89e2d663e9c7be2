"""Jobs of the kind "field": views, teacher, student; conversion; what each field shows on held-out views, and what it took."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import __version__, models, schema, storage, zoo
from limbeck.engine import checkpoint
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.evaluation.cost import stored_bytes
from limbeck.outcome import Outcome
from limbeck.places import user_path
from limbeck.rendering import Views, open_views, render_views
from limbeck.rendering.views import ViewSet
from limbeck.scenes import fields_report as report
from limbeck.scenes.fields import FieldProblem, check_field
from limbeck.scenes.fields_report import Measured
from limbeck.scenes.job import check_recipe, make_method
from limbeck.scenes.program import PHASE, SceneProgram, optimise
from limbeck.scenes.scene import Scene
from limbeck.scenes.scene_method import SceneMethod
from limbeck.zoo import parameters

PRIMARY = "psnr"
RIVAL = "from-images"
"""What a conversion is compared with where the recipe names nothing else."""

OWN = {"points", "background", "equal", "rivals", "curve"}
"""Keys of the recipe's `scene` block that this kind reads."""


# ---- opening ----


def open_recipe_views(recipe: schema.Recipe, given: Any = None) -> ViewSet:
    """The posed views of a recipe's `data` block."""
    if isinstance(given, ViewSet):
        return given
    spec = recipe.data
    for name in ("labelled", "label", "channels", "label_noise"):
        if getattr(spec, name) is not None:
            raise UserError(f"data.{name} has no meaning for posed views", "leave it out")
    return open_views(spec.source, spec.train, spec.valid, spec.test, spec.size, spec.seed, **spec.args)


def held_out(views: ViewSet, final: str) -> Views:
    """The views by which fields are judged.

    Raises:
        UserError: the validation part is asked for, and there is none.
    """
    if final == "test":
        return views.test
    if views.valid is None:
        raise UserError(f"evaluation.final is valid, and {views.name} has no such part", "set data.valid, or evaluation.final=test")
    return views.valid


def _network(spec: schema.Model, views: ViewSet, seed: int, name: str) -> nn.Module:
    """A field as a recipe names it; embedded ones are made for the scene's cube."""
    seed_everything(seed, "network")
    if spec.adapter is not None:
        raise UserError(f"{name}.adapter has no meaning for fields", "leave it out")
    embedded = spec.model.removeprefix("zoo:") in zoo.NETWORKS
    args = {"bound": views.bound, **spec.args} if embedded and spec.model.removeprefix("zoo:").startswith("field-") else dict(spec.args)
    try:
        if embedded and not spec.model.removeprefix("zoo:").startswith("field-"):
            raise UserError(f"{spec.model} is no radiance field", "name field-mlp, field-hash, field-vm or field-voxels")
        network = zoo.build(spec.model, **args)
        if spec.weights:
            network = zoo.load_model(user_path(spec.weights), model=network)
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.hint) from None
    check_field(network, views.bound, name)
    return network


def _teacher(recipe: schema.Recipe, views: ViewSet, spec: schema.Scene, session: Session, given: Any) -> nn.Module | None:
    """The teacher, trained if the recipe says so (once, then kept), frozen."""
    if given is not None:
        network = given
        check_field(network, views.bound, "teacher")
    elif not recipe.teacher.models:
        return None
    elif len(recipe.teacher.models) > 1:
        raise UserError(f"a field is converted from one teacher, and the recipe names {len(recipe.teacher.models)}", "name one")
    else:
        ((name, model),) = recipe.teacher.models.items()
        network = _network(model, views, model.train.seed if model.train else 0, name).to(session.device)
        if model.train is not None:
            network = _schooled(network, model, name, views, spec, session)
        elif model.model.removeprefix("zoo:") in zoo.NETWORKS and not model.weights:
            raise UserError(f"the teacher {model.model} would be untrained", "add teacher.train: {steps: 300}, or name a saved field")
    return network.to(session.device).eval().requires_grad_(False)


def _schooled(network: nn.Module, model: schema.Model, name: str, views: ViewSet, spec: schema.Scene, session: Session) -> nn.Module:
    school = model.train
    assert school is not None
    if school.data or school.first is not None:
        raise UserError(f"{name}.train.{'data' if school.data else 'first'} has no meaning for fields", "leave it out")
    if school.steps is None:
        raise UserError(f"{name}.train: a field has no epochs", f"set {name}.train.steps")
    usual = schema.Method(id=RIVAL) if school.method.id == "alone" else school.method
    method = make_method(usual)
    if method.kind != "field" or method.needs_teacher:
        raise UserError(f"{name}.train.method is {usual.id}, which learns no field from pictures", f"leave it out, or name {RIVAL}")
    content = {
        "what": "field",
        "method": {"id": usual.id, **method.values()},
        "model": model.model_dump(exclude={"train"}),
        "start": storage.tensors_fingerprint(network.state_dict()),
        "train": school.model_dump(exclude={"method", "data", "first"}),
        "views": views.fingerprint,
        "points": spec.points,
        "background": spec.background,
        "limbeck": __version__,
        "device": session.device.type,
        "precision": session.precision,
    }

    def train(work: Path, key: str) -> nn.Module:
        problem = FieldProblem(
            network, None, spec, school, int(school.steps or 0), session.device, school.seed, session, views=views, held=views.test
        )
        program = optimise(copy.deepcopy(method), problem, session, name, folder=work, digest=key)
        return method.finish(program.student())

    return models.kept(content, network, session, name, train)


def open_problem(recipe: schema.Recipe, method: SceneMethod, session: Session, given: Mapping[str, Any]) -> FieldProblem:
    """Everything that a recipe of this kind names, opened; the teacher trained if need be."""
    spec = recipe.scene or schema.Scene()
    usual = schema.Scene()
    for name in set(schema.Scene.model_fields) - OWN:
        if getattr(spec, name) != getattr(usual, name):
            raise UserError(f"scene.{name} has no meaning for fields", "leave it out")
    if recipe.student.train is not None:
        raise UserError("student.train has no meaning for a conversion of fields", "name a saved field as student to go on with it")
    views = open_recipe_views(recipe, given.get("data")).to(session.device)
    held = held_out(views, recipe.evaluation.final)
    session.digest += views.fingerprint
    rivals = _rivals(spec)
    if recipe.baseline and spec.rivals is not None and method.card.id in [rival.card.id for rival in rivals]:
        told = "compare settings of one method with `limbeck compare`"
        raise UserError(f"scene.rivals names {method.card.id}, the run's own method", told)
    teacher = _teacher(recipe, views, spec, session, given.get("teacher"))
    if teacher is None:
        for rival in rivals:
            if rival.needs_teacher:
                raise UserError(f"the rival {rival.card.id} learns from a teacher, and the recipe names none", "add a `teacher` block")
    if given.get("student") is not None:
        student = copy.deepcopy(given["student"]).requires_grad_(True)
        check_field(student, views.bound, "student")
    else:
        student = _network(recipe.student, views, recipe.seed, "student")
    student.to(session.device)
    total = int(recipe.training.steps or 0)
    problem = FieldProblem(student, teacher, spec, recipe.training, total, session.device, recipe.seed, session, views=views, held=held)
    problem.start = copy.deepcopy(student)
    return problem


def _rivals(spec: schema.Scene) -> list[SceneMethod]:
    found = [make_method(item) for item in (spec.rivals if spec.rivals is not None else [schema.Method(id=RIVAL)])]
    for rival in found:
        if rival.kind != "field":
            raise UserError(f"the rival {rival.card.id} makes no field", "name another method in scene.rivals")
    ids = [rival.card.id for rival in found]
    if len(set(ids)) < len(ids):
        raise UserError("a rival stands twice in scene.rivals", "compare settings of one method with `limbeck compare`")
    return found


# ---- measuring ----


def _steps_in(seconds: float, method: SceneMethod, problem: FieldProblem, place: Path | None) -> int:
    """How many steps of a method fit into the student's seconds, measured by a few dry steps; noted, so that a resumed run agrees."""
    note = None if place is None else place / f"steps-of-{method.card.id}.json"
    if note is not None and note.is_file():
        return int(json.loads(note.read_text(encoding="utf-8"))["steps"])
    state = checkpoint.random_state()
    dry = replace(problem, student=copy.deepcopy(problem.student))
    program = SceneProgram(copy.deepcopy(method), dry)
    program.train()
    times = []
    for step in range(8):
        started = time.perf_counter()
        clock = Clock(step, problem.total, problem.total)
        for turn in program.turns(clock):
            sum(program.losses(turn, None, clock).values()).backward()  # type: ignore[union-attr]
            program.optimizers()[turn].step()
            program.optimizers()[turn].zero_grad()
        times.append(time.perf_counter() - started)
    checkpoint.restore_random_state(state)
    steps = max(1, round(seconds / sorted(times)[len(times) // 2]))
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(note, {"steps": steps})
    return steps


def _seconds(program: SceneProgram, session: Session, phase: str) -> float:
    return program.trace[-1]["seconds"] if program.trace else session.fits[phase].seconds


def _rival(method: SceneMethod, key: str, problem: FieldProblem, seconds: float, session: Session) -> Measured:
    """The same student optimised by another method, from the same first weights, for as many steps or seconds."""
    own = replace(problem, student=copy.deepcopy(problem.start))
    if problem.spec.equal == "seconds":
        place = None if session.folder is None else session.folder / "checkpoints"
        own.total = _steps_in(seconds, method, own, place)
    phase = key if key == "baseline" else method.card.id
    program = optimise(method, own, session, phase, curve=problem.spec.curve)
    made = method.finish(program.student())
    return measured(problem, made, key, method.card.id, program.trace, _seconds(program, session, phase), own.total)


def measured(
    problem: FieldProblem, network: nn.Module, key: str, name: str, trace: list[dict[str, float]], seconds: float | None, steps: int | None
) -> Measured:
    """One row: pictures, figures, cost."""
    started = time.perf_counter()
    pictures = problem.pictures(network, problem.held)
    spent = 1000 * (time.perf_counter() - started) / len(problem.held)
    figures = report.figures_of(pictures, problem.held.over(problem.plain))
    cost = {"params": parameters(network), "bytes": stored_bytes(network), "latency_ms": spent}
    return Measured(key, name, figures, cost, pictures.cpu(), trace, seconds, steps)


def conclude(
    recipe: schema.Recipe, method: SceneMethod, problem: FieldProblem, student: nn.Module, program: SceneProgram, session: Session
) -> Outcome:
    """Measure teacher and student, optimise and measure the rivals, and say what came out."""
    seconds = _seconds(program, session, PHASE)
    rows = []
    if problem.teacher is not None and recipe.baseline:
        rows.append(measured(problem, problem.teacher, "teacher", "teacher", [], None, None))
    own = measured(problem, student, "student", method.card.id, program.trace, seconds, problem.total)
    if recipe.baseline:
        for number, rival in enumerate(_rivals(problem.spec)):
            if rival.card.id == method.card.id:
                continue
            first = not any(row.key == "baseline" for row in rows)
            rows.append(_rival(rival, "baseline" if first else f"rival {number + 1}", problem, seconds, session))
    rows.append(own)
    metrics = {row.key: row.figures for row in rows if row.key in ("teacher", "baseline", "student")}
    seed_everything(problem.seed, "figures")
    metrics["student"] = {**metrics["student"], **method.figures(student)}
    truth = problem.held.over(problem.plain).cpu()
    summary: dict[str, Any] = {
        "method": method.card.id,
        "wing": "scenes",
        "metrics": metrics,
        "primary": PRIMARY,
        "cost": {row.key: {**row.cost, **({} if row.seconds is None else {"seconds": row.seconds})} for row in rows if row.key in metrics},
        "data": problem.views.describe(),
        "teacher": "none" if problem.teacher is None else type(problem.teacher).__name__,
        "student": type(student).__name__,
        "curve": {row.key: row.trace for row in rows if row.trace},
        "main_phase": PHASE,
    }
    summary["table"] = report.table(rows)
    summary["headline"] = report.headline(method.card.id, rows, problem.spec.equal)
    facts = {"bound": problem.bound, "points": problem.spec.points, "views": problem.views.name}
    scene = Scene(student, "field", facts, partial(report.write_pictures, own.pictures))
    return Outcome({"scene": scene}, summary, sections=partial(report.sections, rows, truth), card=report.card)


def measure_again(recipe: schema.Recipe, network: nn.Module, session: Session) -> dict[str, float]:
    """Figures of a saved field on the held-out views."""
    spec = check_recipe(recipe)
    views = open_recipe_views(recipe).to(session.device)
    check_field(network, views.bound, "the saved scene")
    plain = torch.full((3,), float(spec.background != "black"), device=session.device)
    held = held_out(views, recipe.evaluation.final)
    pictures = render_views(network.eval(), held.cameras, views.bound, spec.points, plain)[0]
    return report.figures_of(pictures, held.over(plain))
