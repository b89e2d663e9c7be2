"""Where the small commands (cache, plan, evaluate, export, inspect) compute: the recipe's device and threads, and no run folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from limbeck import recipe as schema
from limbeck.engine.callbacks import Callback
from limbeck.engine.session import Session, choose_device


def surroundings(recipe: schema.Recipe, callbacks: Sequence[Callback] = ()) -> Session:
    """A session on the recipe's device, with its precision and threads, that keeps nothing on disk.

    Args:
        recipe: checked.
        callbacks: told when something is trained.

    Raises:
        UserError: the device cannot be used.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    return Session(
        device=choose_device(recipe.device), precision=recipe.precision, checkpoints=recipe.checkpoints, callbacks=list(callbacks)
    )
