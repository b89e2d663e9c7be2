"""A piece of work that travels: the name of a function, plain data for it, and plain data that says how it ended."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

from limbeck.errors import UserError, conceal, of_system

Ended = dict[str, Any]
"""How a piece of work ended: `status` is "done", "user" (with `message` and `hint`), "fault" (with `message` and `trace`),
"interrupted", or "killed" (with `message`: its process was lost too often)."""


def carry_out(work: str, item: Any) -> Ended:
    """Do a piece of work in this process; whatever it raises becomes a note.

    Args:
        work: "package.module:function", of one argument; what it does is on the disk, and it returns nothing or an `Ended`.
        item: the argument.
    """
    module, _, function = work.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(item) or {"status": "done"}
    except KeyboardInterrupt:
        return {"status": "interrupted"}
    except Exception as error:
        return told_of(error)


def told_of(error: Exception) -> Ended:
    """The note of an error, called while it is handled: what the user can mend, or a fault with its traceback."""
    if isinstance(error, OSError) and (known := of_system(error)) is not None:
        error = known
    if isinstance(error, UserError):
        return {"status": "user", "message": error.message, "hint": error.hint}
    text = conceal(" ".join(f"{type(error).__name__}: {error}".split()))
    return {"status": "fault", "message": text[:300], "trace": conceal(traceback.format_exc())}
