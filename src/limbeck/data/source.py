"""What a reader hands over, before it is split and checked, and the checks that every source passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.data.split import LoaderSplit, Split, TensorSplit
from limbeck.data.streaming import StreamSplit
from limbeck.errors import UserError

IN_MEMORY = 1 << 30
"""Bytes up to which samples are read into memory at once; larger sets are read batch by batch."""


@dataclass
class Source:
    """Samples as they were read.

    Attributes:
        train, test, valid: parts that the source itself has; `test` is drawn from `train` when None.
        classes: names of the classes, None when only the numbers are known.
        images: inputs are pictures.
        standardise: inputs are table columns, to be scaled by the mean and deviation of the training part.
        test_count: how much is drawn for testing when nobody says.
        note: what reading depended on besides the content; goes into the fingerprint.
        shape: of one sample where a batch does not tell it (graphs: the number of node types).
    """

    train: Split
    test: Split | None = None
    valid: Split | None = None
    classes: tuple[str, ...] | None = None
    images: bool = False
    standardise: bool = False
    test_count: int | float = 0.2
    note: Any = None
    shape: tuple[int, ...] | None = None


def check_finite(inputs: Any, part: str, first: int = 0) -> None:
    """Refuse NaN and infinity.

    Args:
        inputs: `(N, ...)` tensor or a dict of them.
        part: name of the split, for the message.
        first: position of the first row.

    Raises:
        UserError: naming the part, the first sample and the tensor.
    """
    for name, value in inputs.items() if isinstance(inputs, Mapping) else [("inputs", inputs)]:
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            bad = (~torch.isfinite(value)).flatten(1).any(1) if value.ndim > 1 else ~torch.isfinite(value)
            row = int(bad.nonzero()[0])
            raise UserError(
                f"{part} data has NaN or infinity in {name}, first in sample {first + row} ({int(bad.sum())} samples in all)",
                "remove or fill these samples",
            )


def check_split(split: Split, part: str) -> None:
    """Refuse an empty split, and NaN or infinity in one that is held in memory (the first 256 samples of others).

    Raises:
        UserError: naming the part.
    """
    if len(split) == 0:
        raise UserError(f"the {part} data is empty", "give at least one sample")
    if isinstance(split, TensorSplit):
        check_finite(split.inputs, part)
    elif isinstance(split, StreamSplit):
        check_finite(split.batch(torch.arange(min(len(split), 64))).inputs, part)
    elif not isinstance(split, LoaderSplit):
        for index in torch.arange(min(len(split), 256)).split(64):
            check_finite(split.batch(index).inputs, part, int(index[0]))


def check_classes(labels: Tensor | None, classes: tuple[str, ...], part: str) -> None:
    """Refuse labels outside the classes and, in the training part, classes without a sample.

    Raises:
        UserError: naming the label or the class.
    """
    if labels is None or labels.ndim != 1:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= len(classes):
        raise UserError(
            f"{part} data has the label {low if low < -1 else high}, but there are {len(classes)} classes", "number the classes from 0"
        )
    if part == "train":
        sizes = torch.bincount(labels[labels >= 0], minlength=len(classes))
        if (sizes == 0).any():
            name = classes[int((sizes == 0).nonzero()[0])]
            raise UserError(f"class {name!r} has no sample in the train data", "add samples of it, ask for more, or remove the class")
