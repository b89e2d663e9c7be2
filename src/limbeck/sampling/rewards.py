"""Rewards: what a tuned generator should raise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from limbeck.errors import UserError, unknown

Reward = Callable[[Tensor], Tensor]
"""Pictures `(B, C, H, W)` in [-1, 1] to `(B,)` numbers, or `(B, R)` for several rewards; differentiable where gradients are wanted."""


def ink(x: Tensor) -> Tensor:
    """Mean of the pixels: how much is drawn."""
    return x.flatten(1).mean(1)


def make_reward(name: str, pair: Any) -> Reward:
    """A reward by name: "ink", or `python:package.module:function`.

    Raises:
        UserError: there is none of that name, or the module cannot be imported.
    """
    if name == "ink":
        return ink
    if not name.startswith("python:"):
        raise unknown("reward", name, ("ink", "python:package.module:function"))
    module, _, function = name.removeprefix("python:").partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:
        raise UserError(f"the reward {name!r} cannot be imported: {error}", "write python:package.module:function") from None
    if not callable(found):
        raise UserError(f"{module} has no function {function!r}", "write python:package.module:function")
    return found
