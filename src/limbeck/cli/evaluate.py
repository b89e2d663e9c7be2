"""`limbeck evaluate`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.errors import UserError, visible


def evaluate(
    path: Annotated[Path, typer.Argument(help="A run's folder, or the folder of a saved student.")],
    data: Annotated[str | None, typer.Option(help="Other data than the run's, for example csv:new.csv.")] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Change one value of the run's data, e.g. --set data.size=8. May be repeated."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The network that takes the weights, when your own code makes it: python:package.module:factory.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(metavar="WEIGHTS", help="Also the Inception FID of a generator, by torch-fidelity with these weights.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON object for programs.")] = False,
) -> None:
    """Measure a saved student again: its metrics on the test split, and what it costs. Sets, generators and scenes are judged again.

    The data are those of the run that made it, unless others are named. Where the run recorded its figures, they stand beside the
    new ones: on the same data and machine they must be equal.

    Examples: limbeck evaluate runs/digits-kd-001 | limbeck evaluate runs/digits-kd-001 --data csv:new.csv --json
    """
    from limbeck.condensation.judging import is_set
    from limbeck.sampling.generator import is_generator
    from limbeck.scenes.scene import scene_folder

    if inception is not None and not is_generator(path):
        raise UserError("--inception is for generators, and this is none", "leave it out")
    for found, what in ((is_set, "a synthetic set"), (is_generator, "a generator"), (scene_folder, "a scene")):
        if found(path):
            if data is not None or model is not None:
                raise UserError(f"--data and --model are for networks, and this is {what}", "change its run's recipe with --set")
            if found is is_set:
                _judge(path, list(set or []), json)
            elif found is scene_folder:
                _render_again(path, list(set or []), json)
            else:
                _draw_again(path, list(set or []), json, inception)
            return
    from limbeck.saved import measure, open_saved

    found = measure(open_saved(path, model), data, list(set or []))
    if json:
        print(json_module.dumps(found, indent=1))
        return
    _print(found)


def _judge(path: Path, changes: list[str], json: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from limbeck.condensation.judging import judge
    from limbeck.report.tables import ABSENT, human, percent

    found = judge(path, changes)
    if json:
        print(json_module.dumps(found, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(("trained on the set", "accuracy", "recorded", "learning rate")):
        table.add_column(title, justify="right" if number else "left")
    for name, score in found["scores"].items():
        before = found["recorded"].get(name)
        now = f"{100 * score['mean']:.1f} ± {100 * score['std']:.1f} %"
        table.add_row(name, now, ABSENT if before is None else percent(before), f"{score['lr']:g}")
    Console().print(table)
    parts = ", ".join(f"{name} {size}" for name, size in found["bytes"].items())
    print(visible(f"{found['samples']} samples, {human(sum(found['bytes'].values()), 'B')} ({parts})"))


def _draw_again(path: Path, changes: list[str], json: bool, inception: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from limbeck.report.tables import ABSENT, percent
    from limbeck.sampling.again import measure_again

    found = measure_again(path, changes, inception)
    if json:
        print(json_module.dumps(found, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(("steps", "calls", "distance", "recorded", "precision", "recall", "class")):
        table.add_column(title, justify="right" if number else "left")
    for steps, figures in found["figures"].items():
        before = found["recorded"][steps]
        cells = (f"{figures['feature_distance']:.4g}", ABSENT if before is None else f"{before:.4g}")
        shares = (percent(figures["precision"], 0), percent(figures["recall"], 0), percent(figures.get("class_accuracy")))
        table.add_row(steps, str(found["calls"][steps]), *cells, *shares)
    Console().print(table)
    print(f"real training pictures are at distance {found['floor']['feature_distance']:.4g}")
    for steps, value in found.get("inception_fid", {}).items():
        print(visible(f"Inception FID at {steps} step{'s' if int(steps) > 1 else ''}: {value:.4g}"))


def _render_again(path: Path, changes: list[str], json: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from limbeck.report.tables import ABSENT, figure
    from limbeck.scenes.again import measure_again

    found = measure_again(path, changes)
    if json:
        print(json_module.dumps(found, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(("figure", "now", "recorded")):
        table.add_column(title, justify="right" if number else "left")
    for name, value in found["figures"].items():
        before = found["recorded"][name]
        table.add_row(name.replace("_", " "), figure(name, value), ABSENT if before is None else figure(name, before))
    Console().print(table)


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from limbeck.report.tables import ABSENT, figure, human, milliseconds

    recorded, cost = found["recorded"] or {}, found["cost"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(("metric", "now", *(("recorded", "difference") if recorded else ()))):
        table.add_column(title, justify="right" if number else "left")
    for name, value in found["metrics"].items():
        before = recorded.get(name)
        beside = (figure(name, before), ABSENT if before is None else f"{value - before:+.2g}") if recorded else ()
        table.add_row(name.replace("_", " "), figure(name, value), *beside)
    Console().print(table)
    work = f"{human(cost['flops'], 'FLOP')}, {milliseconds(cost['latency_ms'])} for one sample on {cost['device']}"
    print(visible(f"{human(cost['params'])} parameters, {work}, {human(cost['bytes'], 'B')} on disk"))
    print(visible(f"measured on {found['data']['test']} test samples of {found['data']['name']}"))
    if recorded:
        worst = max((abs(value - recorded[name]) for name, value in found["metrics"].items() if name in recorded), default=0.0)
        if worst < 1e-6:
            print("the figures are those that the run recorded")
        elif found["same_data"] is False:
            print("note: these are other data than the run's, so the difference says little")
        else:
            print(f"note: on the run's own data the figures differ from the recorded ones by up to {worst:.2g}")
