"""A synthetic set that was saved: opened together with the recipe of its run, and judged again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck import models
from limbeck import recipe as schema
from limbeck.condensation.graphset import GraphSet
from limbeck.condensation.job import open_problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.session import Session, choose_device
from limbeck.errors import UserError
from limbeck.places import user_path
from limbeck.recorded import recipe_of, run_of, summary_if_finished


def is_set(path: str | Path) -> bool:
    """Whether a folder is a synthetic set, or a run that made one."""
    path = user_path(path)
    return any((folder / "set.json").is_file() for folder in (path, path / "dataset"))


def load_dataset(folder: str | Path) -> SyntheticSet | GraphSet:
    """Open the set of a run, or any folder that `SyntheticSet.save` or `GraphSet.save` wrote.

    Args:
        folder: a run's folder, or the `dataset/` folder inside it.

    Raises:
        UserError: there is no set in it, or its files are torn or altered.
    """
    folder = user_path(folder)
    note = next((f / "set.json" for f in (folder / "dataset", folder) if (f / "set.json").is_file()), None)
    try:
        kind = "" if note is None else json.loads(note.read_text("utf-8")).get("kind", "")
    except (ValueError, AttributeError):
        kind = ""  # what is damaged is said by `load`
    return GraphSet.load(folder) if kind == "limbeck graph set" else SyntheticSet.load(folder)


def judge(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Score a saved set by the protocol of the run that made it.

    Args:
        path: the run's folder, or its `dataset/` folder while it lies there.
        changes: `condense.key=value`, `data.key=value` or `seed=` overrides, for example other networks.

    Returns:
        `path`, `samples`, `bytes` by part, `scores` by architecture (accuracies, mean, std, lr), and `recorded`: the means that the run
        recorded.

    Raises:
        UserError: there is no set or no recipe, or the data has another shape.
    """
    import torch

    path = user_path(path)
    made = load_dataset(path)
    run = run_of(path)
    if run is None:
        raise UserError(f"{path} lies outside its run, so its protocol is unknown", "name the folder of the run that made it")
    recipe = recipe_of(run, changes)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    session = Session(device=choose_device(recipe.device))
    data = models.open_recipe_data(recipe.data)
    unneeded = {"teacher": schema.Teacher()}  # students of a finished set look at no teacher
    problem = open_problem(recipe.model_copy(update=unneeded), data, session, {})
    shape = (made.node_types,) if isinstance(made, GraphSet) else tuple(made.images.shape[1:])
    if isinstance(made, GraphSet) != problem.graphs or shape != problem.input_shape:
        raise UserError(f"the set has samples of shape {shape}, the data {problem.input_shape}", "name the data that it was made from")
    if isinstance(made, SyntheticSet):
        made = made.to(session.device)
    protocol = problem.protocol(recipe)
    scores = {name: protocol.score(made, name) for name in protocol.architectures}
    recorded: Mapping[str, Any] = summary_if_finished(run) or {}
    before = (recorded.get("scores") or {}).get(recorded.get("method"), {})
    return {
        "path": str(path),
        "samples": len(made),
        "bytes": made.bytes(),
        "scores": {n: {"accuracies": s.accuracies, "mean": s.mean, "std": s.std, "lr": s.lr} for n, s in scores.items()},
        "recorded": {name: sum(found["accuracies"]) / len(found["accuracies"]) for name, found in before.items()},
    }
