"""What a person can mend: one line that says what is wrong, one that says how to mend it."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable

LONGEST = 1200
"""Characters of a message; what is longer loses its middle."""

MISFITS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, RecursionError, MemoryError
)  # fmt: skip
"""What code raises on data that were altered, or on values of the right type that cannot be meant: a width of -3, a list for a mapping."""

_KEPT = "\n\t\u200c\u200d"


def printable(text: object) -> str:
    """Text in one line that any terminal, file and page can take: control characters, escapes, marks that turn the direction of writing
    and bytes of a file name that are no text stand there as `\\x1b`, `\\u202e`, `\\udcff`.
    """
    return visible(" ".join(str(text).split()))


def visible(text: str) -> str:
    """As `printable`, with its lines and tabs as they are."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


_SECRETS: set[str] = set()


def keep_secret(*words: str) -> None:
    """From now on these words (keys, passwords) stand in no message and no saved traceback; below 6 characters they are no secret."""
    _SECRETS.update(word for word in words if len(word) >= 6)


def conceal(text: str) -> str:
    """`text` with `***` in the place of every secret."""
    for secret in sorted(_SECRETS, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


class UserError(Exception):
    """A mistake that the user can mend. The command line prints it as `error:` and `hint:` and exits with 2.

    Args:
        message: what is wrong, in one line, naming both sides of a mismatch. What a terminal must not get is escaped, see `printable`.
        hint: what to do about it, in one line, likewise.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(conceal(str(message)))
        self.message = _short(printable(conceal(str(message))))
        self.hint = _short(printable(conceal(str(hint))))

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Fault(Exception):
    """A mistake of limbeck's own that was written down where it happened. The command line names the file and exits with 1.

    Args:
        message: what went wrong.
        trace: the file with the traceback.
    """

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the operating system's errors that mean: no room."""


def of_system(error: Exception, place: str = "") -> UserError | None:
    """What the user can do about an error of the operating system: make room, or choose another folder; None for all others.

    Errors of safetensors tell the system's error in their message alone ("... (os error 28)").

    Args:
        error: any.
        place: what was written, for errors that name no file.
    """
    number, where = 0, f" at {place}" if place else ""
    if isinstance(error, OSError):
        number, where = error.errno or 0, f" at {error.filename}" if error.filename else where
    elif type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number in FULL:
        again = "give the same command again, `limbeck run` with --out FOLDER and, once FOLDER/recipe.yaml is there, --resume"
        if number == errno.EFBIG:
            message = f"a file grew beyond what is allowed{where}: {os.strerror(number)}"
            return UserError(message, f"raise the limit (ulimit -f) and {again}")
        return UserError(f"the disk is full{where}: {os.strerror(number)}", f"make room and {again}")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission{where}: {os.strerror(number)}", "choose a folder that you may write to")
    return None


def unwritable(what: str, error: OSError, hint: str) -> UserError:
    """The error for a place that cannot be written: a full disk is called that, for everything else comes `hint`.

    Args:
        what: the place as a user knows it, "the folder out".
        error: what the operating system said.
        hint: what to do when it is not for want of room.
    """
    full = of_system(error, what) if error.errno in FULL else None
    return full or UserError(f"{what} cannot be written: {error.strerror or error}", hint)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `known` that look most like `name`, best first; at least one when `known` is not empty."""
    known = list(dict.fromkeys(known))
    lowered = {candidate.lower(): candidate for candidate in reversed(known)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.4)
    if not close:
        close = sorted(lowered, key=lambda c: -difflib.SequenceMatcher(None, name.lower(), c).ratio())[:1]
    return [lowered[c] for c in close]


def unknown(kind: str, name: str, known: Iterable[str], listing: str = "") -> UserError:
    """The error for a name that does not exist; it offers the nearest ones.

    Args:
        kind: what the name should have been ("method", "recipe", "key").
        name: what was given.
        known: the names that exist.
        listing: the command that lists them all, if there is one.
    """
    known = list(known)
    close = nearest(name, known)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"there is no {kind} at all here"
    if listing:
        hint += f" `{listing}` lists them all"
    return UserError(f"unknown {kind} {name!r}", hint)
