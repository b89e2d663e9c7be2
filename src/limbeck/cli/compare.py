"""`limbeck compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def compare(
    recipe: Annotated[str, typer.Argument(help="An embedded recipe's name or a YAML file.")],
    methods: Annotated[str, typer.Option(help="Ids with commas between; the first is the reference. Settings: kd@temperature=1;alpha=0.5")],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds (0, 1, ...).")] = 3,
    set: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value for all methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; given again, finished runs are not repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The table as JSON on standard output.")] = False,
) -> None:
    """Run several methods side by side, over several seeds: same recipe, same first weights, same budget.

    Ends with a table of means, 95 % intervals and paired differences to the first method; writes it as CSV, JSON, Parquet and HTML.

    Example: limbeck compare digits --methods alone,kd,pld --seeds 3
    """
    import json as json_module

    from rich.console import Console

    from limbeck import recipe as schema
    from limbeck.evaluation.comparison import cells_of
    from limbeck.run import new_folder

    base = schema.load(recipe, set or [])
    names = [name.strip() for name in methods.split(",") if name.strip()]
    folder = out if out is not None else new_folder(base.model_copy(update={"method": schema.Method(id="compare")}))

    from limbeck import trials
    from limbeck.engine.loop import Interrupted

    try:
        result = trials.compare(base, names, seeds, out=folder, say=lambda line: typer.echo(line, err=True))
    except Interrupted as stop:
        changes = " ".join(f"--set {shlex.quote(change)}" for change in set or [])
        typer.echo(f"{stop}; finished runs are kept", err=True)
        typer.echo(
            f"go on with: limbeck compare {shlex.quote(recipe)} --methods {shlex.quote(methods)} --seeds {seeds} {changes} "
            f"--out {shlex.quote(str(folder))}",
            err=True,
        )
        raise typer.Exit(130) from None
    if json:
        print(json_module.dumps(result.to_json(), indent=1))
        return
    from rich.table import Table

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
    print(f"report: {folder / 'report.html'}")
