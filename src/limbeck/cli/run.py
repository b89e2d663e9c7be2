"""`limbeck run`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def run(
    recipe: Annotated[str, typer.Argument(help="An embedded recipe's name (`limbeck recipes`) or a YAML file.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value, e.g. --set method.temperature=2. May be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default the next free one under runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress line.")] = False,
) -> None:
    """Distil: run a recipe from beginning to end.

    Trains the teacher if the recipe says so (once; it is kept), distils it into the student, trains the same student alone for
    comparison, measures all of them on the test split, and writes a folder with student/, report.html, summary.json and log.jsonl.
    A recipe of the condensation wing makes dataset/ instead, and compares it with real samples of the same number.
    Ctrl-C saves the state; the same command with --out FOLDER --resume goes on.
    Several processes or machines share a run when a launcher starts it: torchrun --nproc-per-node 8 -m limbeck run RECIPE.

    Examples: limbeck run digits | limbeck run tiny-digits | limbeck run digits --set method=pld | limbeck run my.yaml --out runs/mine
    """
    from limbeck import processes
    from limbeck import recipe as schema
    from limbeck.errors import UserError
    from limbeck.run import new_folder

    changes = list(set or [])
    checked = schema.load(recipe, changes)  # before torch is imported: a mistake is answered at once
    if resume and out is None:
        raise UserError("--resume needs to know which run", "add --out with the run's folder")
    folder = out if out is not None else new_folder(checked)
    given = " ".join(f"--set {shlex.quote(change)}" for change in changes)
    command = f"limbeck run {shlex.quote(recipe)} {given}".strip()

    from limbeck.cli.progress import Progress
    from limbeck.engine.loop import Interrupted
    from limbeck.run import execute

    try:
        result = execute(checked, folder, resume=resume, callbacks=[] if quiet else [Progress()], command=command)
        processes.end()
    except Interrupted as stop:
        if processes.number():
            raise typer.Exit(130) from None
        typer.echo(f"{stop}; the state is saved", err=True)
        typer.echo(f"resume with: {command} --out {shlex.quote(str(folder))} --resume", err=True)
        raise typer.Exit(130) from None
    if processes.number() == 0:
        print_result(result)


def print_result(result) -> None:
    """The table, what its last row means, warnings, and where everything is."""
    from rich.console import Console

    from limbeck.errors import printable, visible
    from limbeck.report.tables import headline, run_table

    console, table = Console(), run_table(result.summary)
    console.print()
    wanted = Console(width=200).measure(table).maximum
    (console if wanted <= console.width else Console(width=wanted)).print(table)  # figures that are cut off say nothing
    console.print(printable(headline(result.summary)), highlight=False, markup=False, soft_wrap=True)
    for name, text in result.summary.get("notes", {}).items():
        console.print(printable(f"{name}: {text}"), highlight=False, markup=False, style="dim", soft_wrap=True)
    for text in (*result.summary["warnings"], *result.summary["alarms"]):
        console.print(printable(f"note: {text}"), highlight=False, markup=False, soft_wrap=True)
    print(visible(f"report:  {result.folder / 'report.html'}"))
    for name in result.artifacts:
        print(visible(f"{name + ':':<8} {result.folder / name}"))
