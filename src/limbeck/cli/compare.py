"""`limbeck compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limbeck.errors import visible

if TYPE_CHECKING:
    from limbeck.evaluation.comparison import Comparison


def compare(
    recipe: Annotated[str, typer.Argument(help="An embedded recipe's name or a YAML file.")],
    methods: Annotated[str, typer.Option(help="Ids with commas between; the first is the reference. Settings: kd@temperature=1;alpha=0.5")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds (0, 1, ...).")] = 3,
    set: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value for all methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; given again, finished runs are not repeated.")] = None,
    engine: Annotated[str, typer.Option(help="local (this machine), or ray (also many machines).")] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="So many runs at a time, each in a process of its own; by default one after another in this one."),
    ] = None,
    worker_cpus: Annotated[float | None, typer.Option(help="With --engine ray: processors for each run.")] = None,
    worker_gpus: Annotated[float | None, typer.Option(help="With --engine ray: GPUs for each run, also parts of one.")] = None,
    address: Annotated[
        str | None, typer.Option(help="With --engine ray: a running cluster, auto or HOST:PORT; without it one is started here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The table as JSON on standard output.")] = False,
) -> None:
    """Run several methods side by side, over several seeds: same recipe, same first weights, same budget.

    Ends with a table of means, 95 % intervals and paired differences to the first method; writes it as CSV, JSON, Parquet and HTML.

    The figures do not depend on who computes them. A run that fails is shown as such, and the others go on.

    Examples: limbeck compare digits --methods alone,kd,pld --seeds 3 | limbeck compare digits --methods alone,kd --seeds 8 --workers 4

    limbeck compare digits --methods alone,kd --seeds 8 --engine ray --address auto   (docs/scale-ray.md)
    """
    from limbeck import processes
    from limbeck import recipe as schema
    from limbeck.run import new_folder
    from limbeck.scaling.sizing import Sizing

    processes.check_alone("compare", "start it without one; --workers N or --engine ray make runs side by side")
    sizing = Sizing(engine, workers, worker_cpus, worker_gpus, address)
    if engine == "ray":
        from limbeck.scaling.cluster import ready

        ready(sizing)
    base = schema.load(recipe, set or [])
    names = [name.strip() for name in methods.split(",") if name.strip()]
    folder = out if out is not None else new_folder(base.model_copy(update={"method": schema.Method(id="compare")}))

    from limbeck import trials
    from limbeck.engine.loop import Interrupted

    try:
        result = trials.compare(base, names, seeds, out=folder, sizing=sizing, say=lambda line: typer.echo(visible(line), err=True))
    except (Interrupted, KeyboardInterrupt) as stop:
        changes = "".join(f" --set {shlex.quote(change)}" for change in set or [])
        options = "".join(f" {shlex.quote(word)}" for word in sizing.words())
        typer.echo(f"{str(stop) or 'interrupted'}; finished runs are kept", err=True)
        typer.echo(
            f"go on with: limbeck compare {shlex.quote(recipe)} --methods {shlex.quote(methods)} --seeds {seeds}{changes} "
            f"--out {shlex.quote(str(folder))}{options}",
            err=True,
        )
        raise typer.Exit(130) from None
    _show(result, folder, json)
    if (failure := trials.failure(result)) is not None:
        raise failure


def _show(result: Comparison, folder: Path, json: bool) -> None:
    import json as json_module

    from rich.console import Console
    from rich.table import Table

    from limbeck.evaluation.comparison import cells_of

    if json:
        print(json_module.dumps(result.to_json(), indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for head in (
        "method",
        "seeds",
        f"{result.metric} (mean ± sd)",
        "95 % interval",
        f"difference to {result.main_reference}",
        "p",
        "better",
    ):
        table.add_column(head)
    for line in result.table():
        table.add_row(line["label"], str(line["n"]), *cells_of(line))
    Console().print(table)
    print(visible(f"report: {folder / 'report.html'}"))
