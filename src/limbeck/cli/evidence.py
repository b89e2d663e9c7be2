"""`limbeck evidence`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evidence(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; all that have a case when left out.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check that the files are there, sound, and newer than method and case.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Keep the single runs here; finished ones are not repeated.")] = None,
) -> None:
    """Make or check the evidence of methods.

    Each runs against the baseline that its paper argues against: same budget, same tuning, several seeds.

    Examples: limbeck evidence pld | limbeck evidence --check
    """
    from limbeck import processes, trials
    from limbeck.cli.methods import evidence_text
    from limbeck.errors import UserError
    from limbeck.evaluation.evidence import brief

    processes.check_alone("evidence", "start it without one")

    ids = list(methods or trials.cases())
    if check:
        problems = trials.check_evidence(ids)
        if problems:
            first = next(iter(problems))
            for id, lines in problems.items():
                for line in lines:
                    print(f"{id}: {line}")
            raise UserError(f"the evidence of {', '.join(problems)} is missing or stale", f"`limbeck evidence {first}` makes it again")
        print(f"the evidence of {len(ids)} methods is sound and up to date")
        return
    for id in ids:
        found = trials.make_evidence(id, work=None if work is None else work / id, say=lambda line: typer.echo(line, err=True))
        print(f"{id}: {evidence_text(brief(found))}")
