"""The runs of a comparison: one after another, in processes of this machine, or as tasks of Ray. One that fails takes no other with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck import recipe as schema
from limbeck import storage
from limbeck.errors import UserError
from limbeck.scaling.sizing import Sizing
from limbeck.scaling.work import Ended, told_of

WORK = "limbeck.trial_runs:trial"


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
        label: its method as it was written.
        recipe: with its method and seed.
        folder: of its run.
    """

    label: str
    recipe: schema.Recipe
    folder: Path

    def __str__(self) -> str:
        return f"{self.label} seed {self.recipe.seed}"


def finished(folder: Path, recipe: schema.Recipe, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The summary of a run in `folder`: read when it is finished, resumed when it is not, started when there is none."""
    from limbeck.run import execute

    if (found := found_in(folder, recipe)) is not None:
        return found
    resume = (folder / "recipe.yaml").is_file()
    return execute(recipe.model_copy(update={"trackers": []}), folder, resume=resume, given=given, report=False).summary


def found_in(folder: Path, recipe: schema.Recipe) -> dict[str, Any] | None:
    """The summary of a finished run of this recipe; None where there is none."""
    from limbeck.recorded import summary_of
    from limbeck.run import binding

    if not (folder / "recipe.yaml").is_file() or not (folder / "summary.json").is_file():
        return None
    old = schema.load((folder / "recipe.yaml").absolute())  # a "~" in it is a name here
    return summary_of(folder) if binding(old) == binding(recipe) else None


def trial(item: Mapping[str, Any]) -> Ended:
    """Finish one run in this process. What went wrong inside limbeck is written beside the run.

    Args:
        item: `folder`, `recipe` (as written) and `threads`.
    """
    import torch

    from limbeck.engine.loop import Interrupted

    torch.set_num_threads(item["threads"])
    try:
        finished(Path(item["folder"]), schema.resolve(item["recipe"]))
    except Interrupted as stop:
        return {"status": "interrupted", "message": str(stop)}
    return {"status": "done"}


def outcomes(
    trials: Sequence[Trial], sizing: Sizing, given: Mapping[str, Any] | None, folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[int, dict[str, Any] | Ended]]:
    """Finish every run that is not finished.

    Args:
        trials: with different folders.
        sizing: who computes. `local` without `workers` is this process.
        given: objects for "teacher", "student", "data"; they stay in this process.
        folder: of the comparison.
        say: told who works, when others than this process do.

    Yields:
        place in `trials`, and its summary or how else it ended, as they end.

    Raises:
        Interrupted, KeyboardInterrupt: after Ctrl-C; what was finished is kept, and the others go on from their last checkpoints.
        UserError: objects that cannot travel; no cluster.
    """
    alone = sizing.engine == "local" and sizing.workers is None
    if given and not alone:
        raise UserError("Python objects do not travel to other processes", "give references instead, or leave engine and workers away")
    if alone:
        for place, one in enumerate(trials):
            yield place, _here(one, given)
        return
    open_places = []
    for place, one in enumerate(trials):
        try:
            found: dict[str, Any] | Ended | None = found_in(one.folder, one.recipe)
        except Exception as error:  # as in `_here`
            found = _noted(one, told_of(error))
        if found is not None:
            yield place, found
        else:
            open_places.append(place)
    if open_places:
        for number, ended in _elsewhere([trials[place] for place in open_places], sizing, folder, say):
            one = trials[open_places[number]]
            if ended["status"] == "interrupted":
                raise KeyboardInterrupt
            yield open_places[number], (finished(one.folder, one.recipe) if ended["status"] == "done" else _noted(one, ended))


def _here(one: Trial, given: Mapping[str, Any] | None) -> dict[str, Any] | Ended:
    from limbeck.engine.loop import Interrupted

    try:
        return finished(one.folder, one.recipe, given)
    except Interrupted:
        raise
    except Exception as error:  # one run may fail in any way; the others go on
        return _noted(one, told_of(error))


def _elsewhere(trials: Sequence[Trial], sizing: Sizing, folder: Path, say: Callable[[str], None]) -> Iterator[tuple[int, Ended]]:
    import torch

    threads = trials[0].recipe.threads or torch.get_num_threads()
    items = [{"folder": str(one.folder.absolute()), "recipe": one.recipe.data_as_written(), "threads": threads} for one in trials]
    if sizing.engine == "local":
        from limbeck.scaling.pool import in_processes

        say(f"{min(sizing.workers or 1, len(items))} processes, {threads} threads each")
        yield from in_processes(WORK, items, sizing.workers or 1)
        return
    from limbeck.engine.session import choose_device
    from limbeck.scaling.cluster import cluster
    from limbeck.scaling.ray_tasks import on_cluster
    from limbeck.scaling.site import shared_site

    gpu = choose_device(trials[0].recipe.device).type == "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    with shared_site(folder, threads) as site, cluster(sizing, threads, gpu) as fleet:
        say(f"{fleet}, {threads} threads each")
        yield from on_cluster(WORK, items, fleet, site)


def _noted(one: Trial, ended: Ended) -> Ended:
    """Write what went wrong inside limbeck beside the run, and say where."""
    if ended["status"] != "fault":
        return ended
    path = one.folder.parent / f"{one.folder.name}.traceback.txt"
    storage.write_text(path, ended["trace"])
    return ended | {"trace": str(path)}
