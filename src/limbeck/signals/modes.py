"""Modes of networks, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """The networks among `models` in evaluation mode; afterwards every module has the mode back that it had itself.

    What is no network (a teacher that is called with batches) is left alone.
    """
    networks = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
