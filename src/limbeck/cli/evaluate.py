"""`limbeck evaluate`."""

from __future__ import annotations


def evaluate() -> None:
    """In the making."""
    from limbeck.errors import UserError

    raise UserError("this command is not finished yet", "wait a little")
