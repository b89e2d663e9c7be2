"""Where limbeck keeps things between runs: trained teachers, trained tokenizers. Never inside the project, never shared by accident."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for limbeck: `$LIMBECK_CACHE`, else the platform's habit (`~/.cache/limbeck` on Linux)."""
    if given := os.environ.get("LIMBECK_CACHE"):
        return Path(given).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("limbeck", appauthor=False))
