"""A generator that was saved, measured again by the recipe of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck import models
from limbeck.engine.session import Session, choose_device
from limbeck.errors import UserError
from limbeck.places import user_path
from limbeck.recorded import recipe_again, recorded_figures
from limbeck.sampling.features import Features, feature_network
from limbeck.sampling.generator import load_generator
from limbeck.sampling.job import PRIMARY, check_recipe
from limbeck.sampling.judge import MOST, Judge
from limbeck.sampling.pictures import Pictures


def measure_again(path: str | Path, changes: Sequence[str] = (), inception: str | Path | None = None) -> dict[str, Any]:
    """Draw the pictures of a generator anew and measure them against the real ones.

    Args:
        path: a run's folder, or the `generator/` inside it.
        changes: `generate.key=value`, `data.key=value` and the like.
        inception: torch-fidelity's Inception weights, to measure the FID too.

    Returns:
        `path`, `figures` by number of steps, `floor`, `recorded` (those of the run's summary), `calls` by number of steps; with `inception`
        also `inception_fid` by number of steps.

    Raises:
        UserError: the generator does not lie in a run's folder, which says with which data and classifier it is measured.
    """
    import torch

    path = user_path(path)
    generator = load_generator(path)
    run, recipe = recipe_again(path, changes, "generate")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    spec = check_recipe(recipe)
    session = Session(device=choose_device(recipe.device))
    pictures = Pictures(models.open_recipe_data(recipe.data), spec.jitter, session.device, spec.latents)
    if pictures.shape != generator.shape:
        raise UserError(f"the generator draws {generator.shape}, and the data has {pictures.shape}", "give data of the same shape")
    generator.denoiser.network.to(session.device)
    if generator.base is not None:
        generator.base.network.to(session.device)
    judge = Judge(
        pictures,
        Features(feature_network(spec.features, pictures, session), session.device),
        spec.samples,
        recipe.seed,
        recipe.evaluation.final,
    )
    rows = [judge.measure(generator, steps, "student", "student") for steps in spec.steps]
    recorded = recorded_figures(run)
    more: dict[str, Any] = {}
    if inception is not None:
        from limbeck.sampling.inception import inception_fid

        held = pictures.data.valid if recipe.evaluation.final == "valid" else pictures.data.test
        assert held is not None  # the judge has looked
        real = torch.cat([x for x, _ in pictures.whole(held, MOST)])
        drawn = {steps: generator.sample(spec.samples, steps, recipe.seed) for steps in spec.steps}
        more["inception_fid"] = {str(steps): inception_fid(x, real.cpu(), inception) for steps, x in drawn.items()}
    return {
        **more,
        "path": str(path),
        "figures": {str(row.steps): row.figures for row in rows},
        "calls": {str(row.steps): row.calls for row in rows},
        "floor": judge.floor().figures,
        "recorded": {str(row.steps): recorded.get(PRIMARY if n == 0 else f"{PRIMARY}@{row.steps}") for n, row in enumerate(rows)},
    }
