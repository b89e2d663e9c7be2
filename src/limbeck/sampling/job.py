"""A whole job of the sampling wing: teacher, student, distillation, and what each of them draws in how many steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from limbeck import models, processes, schema
from limbeck.diffusion import SAMPLERS, Denoiser
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError, unknown
from limbeck.evaluation.cost import stored_bytes
from limbeck.outcome import Outcome
from limbeck.sampling import report
from limbeck.sampling.features import Features, feature_network
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.judge import Judge, Measured
from limbeck.sampling.pictures import Pictures
from limbeck.sampling.program import SamplingProgram
from limbeck.sampling.teachers import Loader, describe, make_method, steps_of
from limbeck.zoo import parameters

PHASE = "student"
"""The phase of the log in which the generator is trained."""

PRIMARY = "feature_distance"


def check_recipe(recipe: schema.Recipe) -> schema.Generate:
    """The recipe's `generate` block; refuses what this wing would ignore.

    Raises:
        UserError: stages, gradient accumulation, patience, or a sampler that does not exist.
    """
    spec = recipe.generate or schema.Generate()
    if recipe.stages:
        raise UserError("a generator is not distilled in stages", "use student.train: another method first, then this one")
    if recipe.training.accumulate != 1:
        raise UserError("training.accumulate is not for generators", "set training.batch to what fits in memory")
    if recipe.training.labelled_share is not None:
        raise UserError("training.labelled_share is not for generators", "leave it out")
    if recipe.evaluation.patience:
        raise UserError("evaluation.patience is not for generators: nothing is measured while they train", "leave it out")
    ignored = {
        "task": recipe.task != "auto",
        "label_smoothing": recipe.label_smoothing != 0,
        "ceiling": recipe.ceiling,
        "condense": recipe.condense is not None,
        "data.augment": bool(getattr(recipe.data, "augment", None)),
        "evaluation.every": recipe.evaluation.every != 0,
        "evaluation.attack": recipe.evaluation.attack is not None,
        "teacher.kind": recipe.teacher.kind not in ("auto", "frozen"),
    }
    for name, asked in ignored.items():
        if asked:
            raise UserError(f"{name} has no meaning for generators", "leave it out")
    if spec.interval is not None and spec.guidance == 1.0:
        raise UserError(
            "generate.interval limits a guidance, and generate.guidance is 1", "set generate.guidance, or leave the interval out"
        )
    if spec.interval is not None and spec.interval[0] >= spec.interval[1]:
        raise UserError(f"generate.interval {list(spec.interval)} is empty", "give [low, high] with low < high")
    for name in (spec.sampler, spec.teacher_sampler):
        if name is not None and name not in SAMPLERS:
            raise unknown("sampler", name, SAMPLERS)
    return spec


def open_pair(recipe: schema.Recipe, session: Session, given: Mapping[str, Any]) -> tuple[FewStep, Pair]:
    """The method and what it works on: data, teacher (trained if need be), student, as a recipe says."""
    spec = check_recipe(recipe)
    data = processes.first_then_others(lambda: models.open_recipe_data(recipe.data, given.get("data")))
    method = copy.deepcopy(make_method(recipe.method, given.get("method")))
    session.digest += data.fingerprint
    pictures = Pictures(data, spec.jitter, session.device, spec.latents)
    loader = Loader(spec, pictures, session)
    teacher = loader.teacher(recipe.teacher, given.get("teacher"))
    if not method.needs_teacher and teacher is None and recipe.student.model == "teacher":
        raise UserError("the student is to be a copy of the teacher, and there is none", "name a network as student")
    seed_everything(recipe.seed, "student")
    student = loader.student(recipe.student, teacher, given.get("student"))
    if method.needs_pictures() and recipe.training.batch > len(data.train):
        session.notes.append(
            f"training.batch is {recipe.training.batch}, and there are {len(data.train)} training pictures: batches hold those"
        )
    total = steps_of(recipe.training, pictures)
    return method, Pair(teacher, student, pictures, spec, recipe.training, total, session.device, recipe.seed, session)


def distilled(method: FewStep, pair: Pair, session: Session) -> Generator:
    """The method's generator: set up, trained through the engine, finished."""
    seed_everything(pair.seed, f"{method.card.id} set-up")
    program = SamplingProgram(method, pair)
    if method.trains:
        session.fit(program, PHASE, seed=pair.seed, evaluate=False)
    seed_everything(pair.seed, f"{method.card.id} finish")
    generator = method.finish(program.denoiser())
    generator.classes = pair.pictures.data.classes
    generator.clip = not pair.spec.latents
    return generator.compile() if pair.spec.compile else generator


def run(recipe: schema.Recipe, session: Session, given: Mapping[str, Any]) -> Outcome:
    """Distil as the recipe says, and measure teacher and generator by one judge.

    Args:
        recipe: checked.
        session: device, folder, callbacks.
        given: Python objects that stand in for the recipe's references: "teacher", "student", "data", "method".
    """
    method, pair = open_pair(recipe, session, given)
    features = Features(feature_network(pair.spec.features, pair.pictures, session), session.device)
    # before the training, so that data which cannot be measured is told at once
    judge = Judge(pair.pictures, features, pair.spec.samples, pair.seed, recipe.evaluation.final)
    session.notes += judge.notes
    generator = distilled(method, pair, session)
    seed_everything(pair.seed, "judge")
    rows = _measure(judge, generator, pair, session, recipe.baseline)
    return _outcome(recipe, method, generator, pair, rows, session)


def _measure(judge: Judge, generator: Generator, pair: Pair, session: Session, beside: bool) -> list[Measured]:
    """Rows of the table; `beside` also measures the teacher, which comparisons and evidence leave out."""
    spec, teacher = pair.spec, pair.teacher if beside else None
    rows = [judge.floor()]
    wanted = len(spec.steps) + (0 if teacher is None else len(spec.teacher_steps) + len(spec.steps))
    for callback in session.callbacks:
        callback.start("pictures", 0, wanted)
    done = 0

    def add(generator: Generator, steps: int, key: str, name: str) -> None:
        nonlocal done
        rows.append(judge.measure(generator, steps, key, name))
        done += 1
        for callback in session.callbacks:
            callback.tick(done)

    if teacher is not None:
        shape = pair.pictures.shape
        few = Generator(teacher, shape, sampler="ddim", options={"grid": spec.grid})
        if spec.compile:  # both sides of the comparison of speeds
            few.compile()
        for number, steps in enumerate(spec.steps):
            add(few, steps, "baseline" if number == 0 else f"teacher@{steps}", f"teacher, {_count(steps)}")
        many = Generator(teacher, shape, sampler=spec.teacher_sampler, options={"grid": spec.grid})
        for steps in spec.teacher_steps:
            key = "teacher" if steps == spec.teacher_steps[-1] else f"teacher {steps} {spec.teacher_sampler}"
            add(many, steps, key, f"teacher, {steps} {spec.teacher_sampler}")
    for number, steps in enumerate(spec.steps):
        add(generator, steps, "student" if number == 0 else f"student@{steps}", f"distilled, {_count(steps)}")
    for callback in session.callbacks:
        callback.finish("pictures")
    return rows


def _count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def _costs(denoiser: Denoiser, row: Measured) -> dict[str, float]:
    return {
        "params": parameters(denoiser.network),
        "bytes": stored_bytes(denoiser.network),
        "latency_ms": row.latency_ms,
        "calls": row.calls,
        "steps": row.steps,
    }


def _outcome(recipe: schema.Recipe, method: FewStep, generator: Generator, pair: Pair, rows: list[Measured], session: Session) -> Outcome:
    by_key = {row.key: row for row in rows}
    roles = {role: by_key[role] for role in ("teacher", "baseline", "student") if role in by_key}
    metrics = {role: dict(row.figures) for role, row in roles.items()}
    for row in rows:
        if row.key.startswith("student@"):
            metrics["student"] |= {f"{name}@{row.steps}": value for name, value in row.figures.items()}
    metrics["student"]["calls"] = float(by_key["student"].calls)
    seed_everything(pair.seed, "figures")
    metrics["student"] |= method.figures(generator)
    if "teacher" in by_key and metrics["student"]["coverage"] < 0.5 * metrics["teacher"]["coverage"]:
        session.notes.append(
            f"the generator covers {metrics['student']['coverage']:.0%} of the real pictures' neighbourhoods, its teacher "
            f"{metrics['teacher']['coverage']:.0%}: it lost diversity"
        )
    summary: dict[str, Any] = {
        "method": method.card.id,
        "wing": "sampling",
        "metrics": metrics,
        "primary": PRIMARY,
        "floor": by_key["floor"].figures,
        "cost": {
            role: _costs(generator.denoiser if role == "student" or pair.teacher is None else pair.teacher, roles[role]) for role in roles
        },
        "data": pair.pictures.data.describe(),
        "teacher": "none" if pair.teacher is None else describe(pair.teacher.facts()),
        "main_phase": PHASE,
    }
    summary["table"] = report.table(rows)
    summary["headline"] = report.headline(method.card.id, rows)
    return Outcome(
        {"generator": generator},
        summary,
        classes=pair.pictures.data.classes,
        sections=partial(report.sections, rows),
        card=report.card,
    )
