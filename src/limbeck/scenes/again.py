"""A scene that was saved, measured again by the recipe of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.engine.session import Session, choose_device
from limbeck.recorded import recipe_again, recorded_figures
from limbeck.scenes.job import check_recipe, module_of
from limbeck.scenes.scene import load_scene


def measure_again(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a saved scene as its run did.

    Args:
        path: a run's folder, or the `scene/` inside it.
        changes: `scene.key=value`, `data.key=value` and the like.

    Returns:
        `path`, `kind`, `figures`, and `recorded`, those of the run's summary.

    Raises:
        UserError: there is no scene, it does not lie in a run's folder, or the data were a Python object.
    """
    import torch

    network, note = load_scene(path)
    run, recipe = recipe_again(path, changes, "scene")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    check_recipe(recipe)
    session = Session(device=choose_device(recipe.device))
    figures = module_of(note["kind"]).measure_again(recipe, network.to(session.device), session)
    recorded = recorded_figures(run)
    return {"path": str(path), "kind": note["kind"], "figures": figures, "recorded": {name: recorded.get(name) for name in figures}}
