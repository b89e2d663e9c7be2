"""Reading recipes: from files, from Python, with changes from the command line, and errors that help.

The blocks themselves are in `limbeck.schema`. A recipe is checked completely before torch or any model is imported. Everything that a
recipe says is plain data, so the resolved recipe in a run's folder is enough to repeat the run.
"""

from __future__ import annotations

import importlib.util
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from limbeck.dialect import MOST_CHARACTERS, parse_yaml
from limbeck.errors import UserError, unknown
from limbeck.places import user_path
from limbeck.schema import (
    Checkpoints,
    Condense,
    Data,
    Evaluation,
    Generate,
    Method,
    Model,
    Recipe,
    Scene,
    Schooling,
    Stage,
    Strict,
    Teacher,
    Training,
)

__all__ = [
    "Checkpoints",
    "Condense",
    "Data",
    "Evaluation",
    "Generate",
    "Method",
    "Model",
    "Recipe",
    "Scene",
    "Schooling",
    "Stage",
    "Teacher",
    "Training",
    "check_references",
    "embedded",
    "load",
    "override",
    "parse_yaml",
    "resolve",
]

EMBEDDED = Path(__file__).parent / "recipes"
"""The folder of the recipes that come with limbeck."""


def _annotation_model(annotation: Any) -> type[Strict] | None:
    """The block class behind an annotation such as `Model | None` or `list[Stage]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Strict):
        return annotation
    for inner in reversed(typing.get_args(annotation)):
        if found := _annotation_model(inner):
            return found
    return None


def _block_at(path: Iterable[Any]) -> type[Strict] | None:
    block: type[Strict] | None = Recipe
    for key in path:
        if block is None:
            return None
        if isinstance(key, int) or key not in block.model_fields:
            continue
        block = _annotation_model(block.model_fields[key].annotation)
    return block


def _explain(error: ValidationError, where: str) -> UserError:
    problem = error.errors()[0]
    path = [key for key in problem["loc"] if not (isinstance(key, str) and key.startswith("function-"))]
    place = ".".join(str(key) for key in path) or "recipe"
    if problem["type"] == "extra_forbidden":
        block = _block_at(path[:-1])
        result = unknown("key", place, [".".join([*map(str, path[:-1]), name]) for name in block.model_fields] if block else [])
        return UserError(f"{where}: {result.message}", result.hint)
    given = problem.get("input")
    scalar = isinstance(given, (str, int, float, bool, type(None))) and path[-1:] != ["base_url"]  # which may hold a password
    shown = f" (given: {given!r})" if scalar else ""
    return UserError(
        f"{where}: {place}: {problem['msg'].removeprefix('Value error, ')}{shown}",
        f"mend `{place}` in the recipe, or with --set {place}=...",
    )


def expand(raw: Any) -> Any:
    """Write out the short forms of a raw recipe, so that `--set method.temperature=2` or `--set student.args.width=8` find their place.

    What was given stays as it is.
    """
    if not isinstance(raw, Mapping):
        return raw
    raw = dict(raw)
    if isinstance(raw.get("stages"), list):
        raw["stages"] = [dict(stage) if isinstance(stage, Mapping) else stage for stage in raw["stages"]]
    stages = raw["stages"] if isinstance(raw.get("stages"), list) else []
    for block in [raw, *(stage for stage in stages if isinstance(stage, dict))]:
        if isinstance(block.get("method"), str):
            block["method"] = {"id": block["method"]}
        if isinstance(block.get("teacher"), str):
            block["teacher"] = {"model": block["teacher"]}
    if isinstance(raw.get("student"), str):
        raw["student"] = {"model": raw["student"]}
    if isinstance(raw.get("data"), str):
        raw["data"] = {"source": raw["data"]}
    return raw


def _number(key: str, parts: list[Any], path: str, owner: str) -> int:
    """The position that a key of `--set` names in a list."""
    if not (key.isascii() and key.isdigit() and len(key) < 6 and int(key) < len(parts)):
        raise UserError(f"--set {path}: {owner} has no part {key!r}", f"it is a list of {len(parts)} parts, counted from 0")
    return int(key)


def override(raw: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` changes to a raw recipe; `c` is read as YAML (`null`, `[1, 2]`, `0.5`, `word`). What was given stays as it is.

    Raises:
        UserError: a change without `=`, or a path that goes through a value that has no parts.
    """
    raw = dict(raw)
    for change in changes:
        path, equals, text = change.partition("=")
        keys = [key for key in path.strip().split(".") if key]
        if not equals or not keys:
            raise UserError(f"--set {change!r} is not of the form key=value", "for example --set training.epochs=5")
        value = parse_yaml(text, f"--set {path}")
        if keys[0] not in Recipe.model_fields:
            raise unknown("key", keys[0], Recipe.model_fields, "limbeck recipes")
        if len(keys) > 1:
            raw = expand(raw)
        place: Any = raw
        for depth, key in enumerate(keys):
            owner = ".".join(keys[:depth])
            at = _number(key, place, path, owner) if isinstance(place, list) else key
            if depth == len(keys) - 1:
                place[at] = value
                break
            part = {} if isinstance(place, dict) and place.get(at) is None else place[at]
            if not isinstance(part, (dict, list)):
                raise UserError(
                    f"--set {path}: {owner}{'.' if owner else ''}{key} is {part!r} and has no parts", "set the whole of it instead"
                )
            place[at] = part.copy()
            place = place[at]
    return raw


def embedded() -> dict[str, Path]:
    """The recipes that come with limbeck, by name."""
    return {file.stem: file for file in sorted(EMBEDDED.glob("*.yaml"))}


def check_references(recipe: Recipe) -> None:
    """Look up, without importing anything heavy, what a recipe names: the method, and files and folders on disk.

    Raises:
        UserError: the method does not exist, or a named file or folder is missing.
    """
    from limbeck.method import registered

    methods = [recipe.method, *(stage.method for stage in recipe.stages if stage.method)]
    models = [("student", recipe.student), *((f"teacher {name}", model) for name, model in recipe.teacher.models.items())]
    methods += [model.train.method for _, model in models if model.train]
    for method in methods:
        if not method.id.startswith(("python:", "object:")) and method.id not in registered():
            raise unknown("method", method.id, registered(), "limbeck methods")
    prefix, _, rest = recipe.data.source.partition(":")
    if prefix in ("folder", "csv", "parquet", "idx", "posed") and not user_path(rest).exists():
        raise UserError(f"data: there is no {rest}", "check the path; it is read relative to the present folder")
    for role, model in models:
        if model.weights and not user_path(model.weights).exists():
            raise UserError(f"{role}: there is no {model.weights}", "check `weights`; it is read relative to the present folder")
        if model.model.startswith("python:") and importlib.util.find_spec(model.model.split(":")[1].split(".")[0]) is None:
            raise UserError(f"{role}: no module {model.model.split(':')[1]!r} can be found", "put its folder on PYTHONPATH, or install it")


def resolve(raw: Any, where: str = "recipe", changes: Iterable[str] = ()) -> Recipe:
    """A checked recipe from plain data.

    Args:
        raw: a mapping, as YAML gives it.
        where: what to call it in errors.
        changes: `a.b=c` overrides, applied in order.

    Raises:
        UserError: for everything that is wrong with it, one thing at a time, in one line.
    """
    if raw is None:
        raise UserError(f"{where} is empty", "a recipe needs at least `data`, `student` and `method`; see `limbeck recipes`")
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} is a {type(raw).__name__}, not a mapping", "a recipe is made of `key: value` lines")
    if not all(isinstance(key, str) for key in raw):
        raise UserError(f"{where}: every key must be a word", "quote numbers and booleans that are meant as keys")
    try:
        recipe = Recipe.model_validate(override(dict(raw), changes))
    except ValidationError as error:
        raise _explain(error, where) from None
    check_references(recipe)
    return recipe


def load(reference: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, or an embedded one by its name.

    Raises:
        UserError: there is no such file or embedded recipe (the nearest names are offered), or it is not a valid recipe.
    """
    reference = str(reference)
    if reference in embedded():
        path = embedded()[reference]
    else:
        path = user_path(reference)
        if not path.is_file():
            if path.is_dir():
                raise UserError(f"{reference} is a folder", "name a recipe file; `limbeck recipes` lists the embedded ones")
            if path.suffix in (".yaml", ".yml") or "/" in reference:
                raise UserError(f"there is no recipe file {reference}", "check the path; `limbeck recipes` lists the embedded ones")
            raise unknown("recipe", reference, embedded(), "limbeck recipes")
    try:
        if (size := path.stat().st_size) > 4 * MOST_CHARACTERS:
            raise UserError(f"{reference} has {size} bytes", f"a recipe has at most {MOST_CHARACTERS} characters; is this one?")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{reference} cannot be read: {error}", "a recipe is a UTF-8 text file") from None
    return resolve(parse_yaml(text, reference), reference, changes)
