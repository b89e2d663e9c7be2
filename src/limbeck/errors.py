"""What a person can mend: one line that says what is wrong, one that says how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend. The command line prints it as `error:` and `hint:` and exits with 2.

    Args:
        message: what is wrong, in one line, naming both sides of a mismatch.
        hint: what to do about it, in one line.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(str(message).split())
        self.hint = " ".join(str(hint).split())

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


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
