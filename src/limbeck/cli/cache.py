"""`limbeck cache`."""

from __future__ import annotations


def cache() -> None:
    """In the making."""
    from limbeck.errors import UserError

    raise UserError("this command is not finished yet", "wait a little")
