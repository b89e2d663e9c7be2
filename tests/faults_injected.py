"""Faults that a child sets up in itself: death at the k-th file-system operation, no room on the disk, a read-only folder, a mad clock.

All are plain functions of plain numbers, so that they travel to a forked child; `functools.partial` gives them their numbers.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod", "tempfile.mkstemp")
"""Audit events that change a folder. `open` joins them where it may write, and `fsync`, which raises no event, is wrapped."""


def _inside(value: Any, folder: str) -> bool:
    return isinstance(value, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(value)).startswith(folder)


def watch_operations(folder: str, seen: Callable[[str], None]) -> None:
    """Call `seen(name)` before every operation of this process that changes `folder`; a hook cannot be taken back."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and any(_inside(value, folder) for value in arguments[:2]):
            seen(event)
        elif event == "open" and _inside(arguments[0], folder) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen("open")

    sys.addaudithook(hook)
    sync = os.fsync

    def fsync(handle: int) -> None:
        seen("fsync")
        sync(handle)

    os.fsync = fsync


def die_at(folder: str, number: int, torn: bool = False) -> None:
    """SIGKILL just before operation `number` (from 0); with `torn`, and if that is a sync, half of the newest file is lost as well."""
    count = -1

    def seen(name: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            if torn and name == "fsync":
                _tear(Path(folder))
            os.kill(os.getpid(), signal.SIGKILL)

    watch_operations(folder, seen)


def _tear(folder: Path) -> None:
    """Cut the file under way in half, as a power cut may."""
    drafts = [path for path in folder.rglob(".*.tmp") if path.is_file()]
    for path in drafts:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)


def count_operations(folder: str, note: str) -> None:
    """Write down, line by line, the operations of this process in `folder`; the file `note` lies elsewhere."""
    file = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    watch_operations(folder, lambda name: os.write(file, f"{name}\n".encode()) and None)


def fail_at(folder: str, number: int, code: int = errno.ENOSPC) -> None:
    """From operation `number` on, everything that needs room in `folder` fails; removing still works. Portable, and binds root too."""
    count = -1

    def seen(name: str) -> None:
        nonlocal count
        count += 1
        removing = name in ("os.remove", "os.rmdir")
        if count >= number and not (removing and code == errno.ENOSPC):
            raise OSError(code, os.strerror(code))

    watch_operations(folder, seen)


def mad_clock(seed: int) -> None:
    """`time.time` jumps by days, forth and back, at every call."""
    import random

    draw, real = random.Random(seed), time.time
    time.time = lambda: real() + draw.uniform(-1e6, 1e6)
