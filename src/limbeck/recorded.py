"""What a run wrote beside its artifacts: its recipe and its summary, read again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from limbeck import recipe as schema
from limbeck.errors import UserError
from limbeck.places import user_path
from limbeck.storage import read_json


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)

    key: str
    name: str
    cells: list[str]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True)

    head: list[str]
    rows: list[_Row]


class _Data(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str | None = None
    classes: list[str] = []
    input_shape: list[int] | None = None
    fingerprint: str | None = None


class _Score(BaseModel):
    model_config = ConfigDict(strict=True)

    accuracies: list[FiniteFloat] = [0.0]


class _Cost(BaseModel):
    """What a model costs: figures, but for the device and the way in which its memory was measured."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat | None] = {}

    device: str | None = None
    peak_memory_kind: str | None = None


class _Summary(BaseModel):
    """What others read of a summary, strictly; more may stand in it."""

    model_config = ConfigDict(strict=True)

    name: str = ""
    method: str
    wing: str
    seed: int
    primary: str
    seconds: FiniteFloat
    metrics: dict[str, dict[str, FiniteFloat]]
    cost: dict[str, _Cost | None] = {}
    data: _Data | None = None
    versions: dict[str, str] = {}
    table: _Table | None = None
    agreement: dict[str, FiniteFloat] = {}
    scores: dict[str, dict[str, _Score]] = {}

    @model_validator(mode="after")
    def _has_its_figure(self) -> _Summary:
        if self.primary not in self.metrics.get("student", {}):
            raise ValueError(f"metrics.student has no {self.primary}")
        return self


def run_of(path: str | Path) -> Path | None:
    """The folder of the run that a path is, or that an artifact's folder lies in; None where there is none."""
    path = user_path(path)
    return next((folder for folder in (path, path.parent) if (folder / "recipe.yaml").is_file()), None)


def recipe_of(run: Path, changes: Sequence[str] = ()) -> schema.Recipe:
    """The resolved recipe of a run, with `key=value` overrides."""
    return schema.load(run / "recipe.yaml", list(changes))


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
    again = "run again with --resume to write it anew"
    found = read_json(path, again)
    try:
        _Summary.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not the summary of a run: {where + ': ' if where else ''}{first['msg']}", again) from None
    return found


def summary_if_finished(run: Path) -> dict[str, Any] | None:
    """The summary of a run; None where it is not finished."""
    return summary_of(run) if (run / "summary.json").is_file() else None


def recorded_figures(run: Path) -> dict[str, float]:
    """What the run measured of what it made; empty where it is not finished."""
    summary = summary_if_finished(run)
    return {} if summary is None else summary["metrics"]["student"]
