"""`limbeck recipes`."""

from __future__ import annotations

from typing import Annotated

import typer


def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe, to copy and change it.")] = None) -> None:
    """List the embedded recipes, or print one as YAML.

    Examples: limbeck recipes | limbeck recipes digits > my.yaml
    """
    from limbeck import recipe as schema
    from limbeck.errors import unknown

    found = schema.embedded()
    if name is not None:
        if name not in found:
            raise unknown("recipe", name, found, "limbeck recipes")
        print(found[name].read_text(encoding="utf-8"), end="")
        return
    for key, path in found.items():
        about = (schema.parse_yaml(path.read_text(encoding="utf-8"), key) or {}).get("about", "")
        print(f"{key:<16} {about}")
