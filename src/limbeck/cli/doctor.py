"""`limbeck doctor`."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="A JSON list for programs.")] = False) -> None:
    """Say what this machine offers: versions, devices, optional extras, the cache folder, free disk.

    A missing extra is no fault: the line says what it would give and how to install it. The exit code is 0, or 2 when something
    essential is broken. Paste the output into a bug report.

    Examples: limbeck doctor | limbeck doctor --json
    """
    from limbeck.health import examine

    checks = examine()
    if json:
        print(json_module.dumps([check.as_dict() for check in checks], indent=1))
    else:
        group = ""
        for check in checks:
            if check.group != group:
                group = check.group
                print(f"{group}:")
            mark = "" if check.status == "ok" else f"{check.status}: "
            print(f"  {check.name:<24} {mark}{check.text}" + (f"  -> {check.hint}" if check.hint else ""))
    broken = [check for check in checks if check.status == "broken"]
    if broken:
        from limbeck.errors import UserError

        raise UserError(f"{', '.join(check.name for check in broken)} cannot be used: {broken[0].text}", broken[0].hint)
