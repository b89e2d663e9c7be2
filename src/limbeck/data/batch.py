"""One batch, as every part of the house sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

UNLABELLED = -1
"""The label of a sample whose label is hidden from the student."""

IGNORE = -100
"""The label of a token that is not scored, as in transformers."""


def move(value: Any, device: torch.device | str) -> Any:
    """Move every tensor of a nested structure (tensor, mapping, tuple, list) to a device; other values stay."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move(item, device) for item in value)
    return value


def cut(value: Any, pick: slice) -> Any:
    """The same rows of every tensor of a nested structure (tensor, mapping, tuple, list); other values stay."""
    if isinstance(value, Tensor):
        return value[pick] if value.ndim else value
    if isinstance(value, dict):
        return {key: cut(item, pick) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cut(item, pick) for item in value)
    return value


@dataclass
class Batch:
    """Samples that go through a model together.

    Attributes:
        inputs: what a model is called with: a tensor `(B, ...)` becomes `model(x)`, a dict `model(**x)`, a tuple `model(*x)`.
        labels: `(B,)` int64 class numbers, `UNLABELLED` (-1) where hidden; `(B, C)` float for multi-label tasks (a row of
            -1 where hidden); None when the data has no labels at all.
        index: `(B,)` int64 positions in the training split: the key of histories and stored teacher outputs; None for
            loaders that cannot tell.
        extra: whatever else the data brings, untouched.
    """

    inputs: Any
    labels: Tensor | None = None
    index: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        for value in (self.labels, self.index):
            if value is not None:
                return len(value)
        inputs = self.inputs
        if isinstance(inputs, dict):
            inputs = next(iter(inputs.values()))
        elif isinstance(inputs, (tuple, list)):
            inputs = inputs[0]
        return len(inputs)

    @property
    def labelled(self) -> Tensor:
        """`(B,)` bool: which samples have a label."""
        if self.labels is None:
            return torch.zeros(len(self), dtype=torch.bool)
        labels = self.labels if self.labels.ndim == 1 else self.labels.amin(1)
        return labels != UNLABELLED

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(move(self.inputs, device), move(self.labels, device), move(self.index, device), move(self.extra, device))

    def rows(self, pick: slice) -> Batch:
        """Some of its samples."""
        return Batch(cut(self.inputs, pick), cut(self.labels, pick), cut(self.index, pick), cut(self.extra, pick))

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed (the other fields are shared, not copied)."""
        return replace(self, **changes)
