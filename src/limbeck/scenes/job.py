"""A whole job of the scenes wing: what every kind of scene shares. Opening and measuring belong to one module for each kind."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from limbeck import method as registry
from limbeck import schema
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError, unknown
from limbeck.outcome import Outcome
from limbeck.scenes.program import SceneProgram, optimise
from limbeck.scenes.scene_method import KINDS, Problem, SceneMethod


def make_method(spec: schema.Method, given: Any = None) -> SceneMethod:
    """A method of this wing, made from a recipe's block.

    Raises:
        UserError: it belongs to another wing.
    """
    return registry.of_wing(spec.id, spec.settings, given, SceneMethod, "scenes")


def check_recipe(recipe: schema.Recipe) -> schema.Scene:
    """The recipe's `scene` block; refuses what this wing would ignore.

    Raises:
        UserError: stages, epochs, gradient accumulation, patience, or blocks of other wings.
    """
    if recipe.stages:
        raise UserError("a scene is not optimised in stages", "leave `stages` out; a method's own stages are settings of it")
    if recipe.training.steps is None:
        raise UserError("a scene has no epochs", "set training.steps")
    ignored = {
        "training.accumulate": recipe.training.accumulate != 1,
        "training.labelled_share": recipe.training.labelled_share is not None,
        "evaluation.patience": bool(recipe.evaluation.patience),
        "evaluation.every": recipe.evaluation.every != 0,
        "evaluation.attack": recipe.evaluation.attack is not None,
        "task": recipe.task != "auto",
        "label_smoothing": recipe.label_smoothing != 0,
        "ceiling": recipe.ceiling,
        "condense": recipe.condense is not None,
        "generate": recipe.generate is not None,
        "structure": recipe.structure is not None,
        "text": recipe.text is not None,
        "data.augment": bool(recipe.data.augment),
        "teacher.kind": recipe.teacher.kind not in ("auto", "frozen"),
        "teacher.weights": recipe.teacher.weights is not None,
        "teacher.store": recipe.teacher.store is not None,
        "teacher.endpoint": recipe.teacher.endpoint is not None,
    }
    for name, asked in ignored.items():
        if asked:
            raise UserError(f"{name} has no meaning for scenes", "leave it out")
    return recipe.scene or schema.Scene()


def module_of(kind: str) -> ModuleType:
    """The module that opens and measures scenes of a kind.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise unknown("kind of scene", kind, KINDS)
    return importlib.import_module(KINDS[kind])


def open_problem(recipe: schema.Recipe, session: Session, given: Mapping[str, Any]) -> tuple[SceneMethod, Problem]:
    """The method and what it works on: data, teacher (trained if need be), student, as a recipe says."""
    check_recipe(recipe)
    method = copy.deepcopy(make_method(recipe.method, given.get("method")))
    problem = module_of(method.kind).open_problem(recipe, method, session, given)
    return method, problem


def optimised(method: SceneMethod, problem: Problem, session: Session) -> tuple[nn.Module, SceneProgram]:
    """The method's student: set up, optimised through the engine, finished; and the program, which holds the curve over time."""
    program = optimise(method, problem, session, curve=problem.spec.curve)
    seed_everything(problem.seed, f"{method.card.id} finish")
    return method.finish(program.student()), program


def run(recipe: schema.Recipe, session: Session, given: Mapping[str, Any]) -> Outcome:
    """Optimise as the recipe says, and measure what went in, what came out and what it is compared with.

    Args:
        recipe: checked.
        session: device, folder, callbacks.
        given: Python objects that stand in for the recipe's references: "teacher", "student", "data", "method".
    """
    method, problem = open_problem(recipe, session, given)
    student, program = optimised(method, problem, session)
    return module_of(method.kind).conclude(recipe, method, problem, student, program, session)
