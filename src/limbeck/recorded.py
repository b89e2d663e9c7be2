"""What a run wrote beside its artifacts: its recipe and its summary, read again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck import recipe as schema
from limbeck.errors import UserError


def run_of(path: str | Path) -> Path | None:
    """The folder of the run that a path is, or that an artifact's folder lies in; None where there is none."""
    path = Path(path).expanduser()
    return next((folder for folder in (path, path.parent) if (folder / "recipe.yaml").is_file()), None)


def recipe_of(run: Path, changes: Sequence[str] = ()) -> schema.Recipe:
    """The resolved recipe of a run, with `key=value` overrides."""
    file = run / "recipe.yaml"
    return schema.resolve(schema.parse_yaml(file.read_text(encoding="utf-8"), str(file)), str(file), list(changes))


def recipe_again(path: str | Path, changes: Sequence[str], block: str) -> tuple[Path, schema.Recipe]:
    """The run that an artifact lies in and its recipe, to measure the artifact as its run did.

    Args:
        path: a run's folder, or the artifact's folder inside it.
        changes: `key=value` overrides of what can be changed when nothing is made again.
        block: the wing's own block of the recipe, which can.

    Raises:
        UserError: it lies in no run's folder, an override would change nothing, or the data were a Python object.
    """
    run = run_of(path)
    if run is None:
        raise UserError(
            f"{path} lies in no run's folder, so the data to measure it with is unknown", "give the folder that `limbeck run` wrote"
        )
    for change in changes:
        if not change.startswith((f"{block}.", "data", "evaluation", "device", "threads", "seed")):
            raise UserError(f"--set {change} changes nothing here", f"only {block}, data, evaluation, seed, device and threads can be set")
    recipe = recipe_of(run, changes)
    if recipe.data.source.startswith("object:"):
        raise UserError("the run's data was a Python object, which no file keeps", "name other data: --set data.source=...")
    return run, recipe


def summary_of(folder: str | Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        UserError: the run is not finished, or its summary cannot be read.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished run", f"there is no {os.fspath(path)}; `limbeck run ... --resume` finishes a run")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} cannot be read", "run again with --resume to write it anew") from None


def summary_if_finished(run: Path) -> dict[str, Any] | None:
    """The summary of a run; None where it is not finished."""
    return summary_of(run) if (run / "summary.json").is_file() else None


def recorded_figures(run: Path) -> dict[str, float]:
    """What the run measured of what it made; empty where it is not finished."""
    summary = summary_if_finished(run)
    return {} if summary is None else summary["metrics"]["student"]
