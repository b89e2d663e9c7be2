"""A scene that was saved, measured again by the recipe of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck import recipe as schema
from limbeck.engine.session import Session, choose_device
from limbeck.errors import UserError
from limbeck.scenes.job import check_recipe, module_of
from limbeck.scenes.scene import load_scene, scene_folder

MAY_CHANGE = ("scene.", "data", "evaluation", "device", "threads", "seed")


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

    from limbeck.run import summary_of

    network, note = load_scene(path)
    folder = scene_folder(path)
    assert folder is not None  # it was loaded
    run = folder if (folder / "recipe.yaml").is_file() else folder.parent
    if not (run / "recipe.yaml").is_file():
        raise UserError(
            f"{path} lies in no run's folder, so the data to measure it with is unknown", "give the folder that `limbeck run` wrote"
        )
    for change in changes:
        if not change.startswith(MAY_CHANGE):
            raise UserError(f"--set {change} changes nothing here", "only scene, data, evaluation, seed, device and threads can be set")
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    recipe = schema.resolve(schema.parse_yaml(text, str(run / "recipe.yaml")), str(run / "recipe.yaml"), list(changes))
    if recipe.data.source.startswith("object:"):
        raise UserError("the run's data was a Python object, which no file keeps", "name other data: --set data.source=...")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    check_recipe(recipe)
    session = Session(device=choose_device(recipe.device))
    figures = module_of(note["kind"]).measure_again(recipe, network.to(session.device), session)
    recorded = summary_of(run)["metrics"]["student"] if (run / "summary.json").is_file() else {}
    return {"path": str(path), "kind": note["kind"], "figures": figures, "recorded": {name: recorded.get(name) for name in figures}}
