"""Pictures and drawings under a score model: opened, compared, measured. One of the modules that `scene_method.KINDS` names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import models, schema
from limbeck.data.pictures import Pictures
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError, unknown
from limbeck.evaluation.cost import stored_bytes
from limbeck.features import Features, feature_network
from limbeck.method import registered
from limbeck.outcome import Outcome
from limbeck.scenes import pictures_report as report
from limbeck.scenes.pictures_judge import Measured, PictureJudge
from limbeck.scenes.priors import open_prior
from limbeck.scenes.program import PHASE, SceneProgram, optimise
from limbeck.scenes.scene import Scene
from limbeck.scenes.scene_method import SceneMethod
from limbeck.scenes.score_method import PictureProblem, ScoreDistillation
from limbeck.vector import Drawing
from limbeck.vector.outlines import character_of, name_of

PRIMARY = "coverage"

FIELDS_ONLY = ("points", "background", "equal")
"""Keys of the recipe's `scene` block that radiance fields alone read."""


def labels_of(spec: schema.Scene, pictures: Pictures) -> Tensor | None:
    """`(V,)` the class that each variant is asked to be of.

    Raises:
        UserError: no such class.
    """
    names = tuple(str(name) for name in pictures.data.classes)
    if not names:
        if spec.label not in (None, "any"):
            raise UserError(f"scene.label is {spec.label!r}, and {pictures.data.name} has no classes", "leave it out")
        return None
    if spec.label is None:
        return torch.arange(spec.variants) % len(names)
    if spec.label == "any":
        return torch.full((spec.variants,), len(names))
    return torch.full((spec.variants,), class_number(spec.label, names))


def class_number(label: int | str, names: tuple[str, ...]) -> int:
    """The number of a class from its number, its name, or the character whose Unicode name it is.

    Raises:
        UserError: no such class; the nearest names are offered.
    """
    if isinstance(label, int):
        if label >= len(names):
            raise UserError(f"scene.label is {label}, and there are {len(names)} classes", f"give 0 to {len(names) - 1}, or a name")
        return label
    lowered = [name.lower() for name in names]
    if label.lower() in lowered:
        return lowered.index(label.lower())
    try:
        meant = name_of(character_of(label))
    except UserError:
        meant = ""
    if meant in names:
        return names.index(meant)
    raise unknown("class for scene.label", label, names)


def open_problem(recipe: schema.Recipe, method: SceneMethod, session: Session, given: Mapping[str, Any]) -> PictureProblem:
    """Data, score model (trained and kept if need be), student and judge.

    Raises:
        UserError: see the parts; a method of another kind.
    """
    spec = recipe.scene or schema.Scene()
    if not isinstance(method, ScoreDistillation):
        raise UserError(
            f"{method.card.id} optimises no pictures under a score model", "`limbeck methods --wing scenes` lists those that do"
        )
    for name in FIELDS_ONLY:
        if getattr(spec, name) != getattr(schema.Scene(), name):
            raise UserError(f"scene.{name} has no meaning for pictures and drawings", "leave it out")
    if recipe.student.train is not None:
        raise UserError("student.train has no meaning for pictures and drawings", "leave it out: the student is what is optimised")
    rivals_of(recipe, method)  # told before anything is trained
    data = models.open_recipe_data(recipe.data, given.get("data"))
    session.digest += data.fingerprint
    pictures = Pictures(data, spec.jitter, session.device)
    teacher = open_prior(recipe, spec, pictures, session, given.get("teacher"))
    labels = labels_of(spec, pictures)
    judge = make_judge(recipe, pictures, labels, session)
    labels = None if labels is None else labels.to(session.device)
    problem = PictureProblem(
        None, teacher, spec, recipe.training, int(recipe.training.steps or 0), session.device, recipe.seed, session,
        pictures=pictures, labels=labels, judge=judge,
    )  # fmt: skip
    problem.student = opened(recipe, method, problem, given.get("student"))
    return problem


def opened(recipe: schema.Recipe, method: ScoreDistillation, problem: PictureProblem, given: Any = None) -> nn.Module:
    """A fresh student for a method; the same seed gives every method the same start.

    Raises:
        UserError: it does not render, or not pictures of the data's shape.
    """
    seed_everything(problem.seed, "student")
    student = copy.deepcopy(given) if given is not None else method.make_student(recipe.student, problem)
    student = student.to(problem.device)
    if not hasattr(student, "render") or int(getattr(student, "variants", 0)) != problem.spec.variants:
        raise UserError(
            f"the student renders {getattr(student, 'variants', 'no')} variants, and scene.variants is {problem.spec.variants}",
            "give a module with `variants` and `render(pick)`, and the same number in both",
        )
    with torch.no_grad():
        shape = tuple(student.render(torch.zeros(1, dtype=torch.long, device=problem.device)).shape[1:])
    if shape != problem.pictures.shape:
        raise UserError(
            f"the student renders pictures {shape}, and the data are {problem.pictures.shape}", "set data.size and data.channels"
        )
    return student


def make_judge(recipe: schema.Recipe, pictures: Pictures, labels: Tensor | None, session: Session) -> PictureJudge:
    """Who measures pictures of this recipe; its classifier is trained once and kept."""
    spec = recipe.scene or schema.Scene()
    features = Features(feature_network(spec.features, pictures, session, "scene.features"), session.device)
    return PictureJudge(pictures, features, labels, spec.samples, recipe.seed, recipe.evaluation.final)


def rivals_of(recipe: schema.Recipe, method: ScoreDistillation) -> list[schema.Method]:
    """What the student is compared with: the recipe's `scene.rivals`, else the method that the paper argues against."""
    spec = recipe.scene or schema.Scene()
    if not recipe.baseline:
        return []
    if spec.rivals is not None:
        ids = [rival.id for rival in spec.rivals]
        if len({*ids, method.card.id}) <= len(ids):
            raise UserError("scene.rivals names a method twice, or the run's own", "compare settings of one method with `limbeck compare`")
        return list(spec.rivals)
    usual = method.card.baseline
    return [schema.Method(id=usual)] if usual in registered() else []


def conclude(
    recipe: schema.Recipe, method: SceneMethod, problem: PictureProblem, student: nn.Module, program: SceneProgram, session: Session
) -> Outcome:
    """Rivals from the same start, measurements, table, the artifact."""
    from limbeck.scenes.job import make_method

    assert isinstance(method, ScoreDistillation)
    judge = problem.judge
    rows: list[Measured] = [judge.floor()]
    if recipe.baseline and problem.teacher is not None:
        rows.append(judge.prior(problem.teacher))
    traces = {method.card.id: program.trace}
    seconds = {"student": program.seconds}
    for number, spec in enumerate(rivals_of(recipe, method)):
        rival = make_method(spec)
        own = copy.copy(problem)
        own.student = opened(recipe, rival, own)
        ran = optimise(rival, own, session, f"rival-{rival.card.id}-{number}", problem.spec.curve)
        key = "baseline" if number == 0 else f"rival {number}"
        rows.append(judge.measure(rival.finish(ran.student()), key, rival.card.id))
        traces[rival.card.id], seconds[key] = ran.trace, ran.seconds
    rows.append(judge.measure(student, "student", method.card.id))
    metrics = {row.key: dict(row.figures) for row in rows if row.key in ("teacher", "baseline", "student")}
    seed_everything(problem.seed, "figures")
    metrics["student"] |= {"seconds": program.seconds, **method.figures(student)}
    summary: dict[str, Any] = {
        "method": method.card.id,
        "wing": "scenes",
        "metrics": metrics,
        "primary": PRIMARY,
        "floor": rows[0].figures,
        "cost": {"student": {"params": sum(p.numel() for p in student.parameters()), "bytes": stored_bytes(student)}},
        "seconds_of": seconds,
        "data": problem.pictures.data.describe(),
        "main_phase": PHASE,
        "curve": traces,
    }
    summary["table"] = report.table(rows)
    summary["headline"] = report.headline(rows)
    kind = "paths" if isinstance(student, Drawing) else "picture"
    names = problem.pictures.data.classes
    labels = None if problem.labels is None else problem.labels.tolist()
    asked = [] if labels is None else [str(names[n]) if n < len(names) else "any" for n in labels]
    scene = Scene(student, kind, {"asked": asked, "shape": list(problem.pictures.shape)}, partial(report.write_files, student, asked))
    sections = partial(report.sections, rows, traces, student, asked)
    return Outcome({"scene": scene}, summary, classes=names, sections=sections, card=report.card)


def measure_again(recipe: schema.Recipe, network: nn.Module, session: Session) -> dict[str, float]:
    """The figures of a saved scene."""
    spec = recipe.scene or schema.Scene()
    if not hasattr(network, "render"):
        raise UserError(f"the scene is a {type(network).__name__}, which renders no pictures", "restore or remake the folder")
    data = models.open_recipe_data(recipe.data)
    pictures = Pictures(data, spec.jitter, session.device)
    labels = labels_of(spec.model_copy(update={"variants": int(network.variants)}), pictures)
    judge = make_judge(recipe, pictures, labels, session)
    return judge.measure(network, "student", "saved").figures
