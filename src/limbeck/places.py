"""Where limbeck keeps things between runs: trained teachers, trained tokenizers. Never inside the project, never shared by accident."""

from __future__ import annotations

import os
from pathlib import Path

from limbeck.errors import UserError


def cache_folder() -> Path:
    """The user's cache folder for limbeck: `$LIMBECK_CACHE`, else the platform's habit (`~/.cache/limbeck` on Linux)."""
    if given := os.environ.get("LIMBECK_CACHE"):
        return Path(given).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("limbeck", appauthor=False))


def user_path(path: str | Path) -> Path:
    """A path as a person wrote it, `~` for the home folder. It need not exist.

    Raises:
        UserError: no file can have such a name: a home that is not known, a NUL, or more characters than a file system takes.
    """
    try:
        found = Path(path).expanduser()
        if all(len(part) <= 255 for part in map(os.fsencode, found.parts)) and len(os.fsencode(found)) < 4096 and "\0" not in str(found):
            return found
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UserError(f"the path {path} cannot be used: {error}", "write the whole path") from None
    raise UserError(f"no file can have the name {str(path)[:80]!r}", "check the path")
