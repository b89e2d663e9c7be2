"""Data that a Python program already has: tensors, arrays, torch Datasets and DataLoaders, `datasets` objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from limbeck.data.data import Data
from limbeck.data.source import Source
from limbeck.data.split import DatasetSplit, LoaderSplit, Split, TensorSplit
from limbeck.errors import UserError

_WANTED = "give (inputs, labels) tensors, a torch Dataset or DataLoader, a datasets.Dataset, or a dict of these by part"


def _is_rows(value: Any) -> bool:
    """Whether it is a `datasets.Dataset`; the library is not imported to find out."""
    return type(value).__module__.startswith("datasets.") and hasattr(value, "column_names")


def _inputs(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: torch.as_tensor(v) for k, v in value.items()}
    inputs = torch.as_tensor(value)
    return inputs.float() if inputs.dtype == torch.float64 else inputs


def _labels(value: Any) -> Tensor | None:
    if value is None:
        return None
    labels = torch.as_tensor(value)
    if labels.ndim not in (1, 2):
        raise UserError(f"labels have shape {tuple(labels.shape)}", "give (N,) class numbers, or (N, C) for several classes at once")
    if labels.ndim == 1 and labels.is_floating_point() and bool((labels % 1 != 0).any()):
        raise UserError("labels are fractions", "give (N,) class numbers")
    return labels.long() if labels.ndim == 1 else labels.float()


def _part(value: Any, label: str | None) -> Split:
    """One split from one object."""
    if isinstance(value, Split):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        try:
            return TensorSplit(_inputs(value[0]), _labels(value[1]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the pair cannot be read as (inputs, labels): {error}", _WANTED) from None
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return TensorSplit(_inputs(value))
    if isinstance(value, DataLoader):
        if isinstance(value.dataset, IterableDataset):
            return LoaderSplit(value, label)
        plain = value.collate_fn is default_collate
        split = _part(value.dataset, label) if plain else DatasetSplit(value.dataset, value.collate_fn, label)
        split.batch_size = value.batch_size
        return split
    if isinstance(value, IterableDataset):
        return LoaderSplit(DataLoader(value, batch_size=64), label)
    if isinstance(value, TensorDataset) and len(value.tensors) <= 2:
        return TensorSplit(_inputs(value.tensors[0]), _labels(value.tensors[1]) if len(value.tensors) == 2 else None)
    sequence = hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (Mapping, str))
    if isinstance(value, Dataset) or sequence:
        return DatasetSplit(value, None, label)
    raise UserError(f"a {type(value).__name__} cannot be read as data", _WANTED)


def _class_names(value: Any) -> tuple[str, ...] | None:
    """Names under torchvision's habit `dataset.classes`, if it is kept."""
    found = getattr(getattr(value, "dataset", value), "classes", None)
    return tuple(map(str, found)) if isinstance(found, (list, tuple)) and found else None


def read_object(
    source: Any,
    label: str | None = None,
    classes: tuple[str, ...] | None = None,
    size: int | None = None,
    channels: int | None = None,
    columns: list[str] | None = None,
) -> Source:
    """Data from Python objects.

    Args:
        source: `(inputs, labels)`, inputs alone, a Dataset, a DataLoader, a `datasets.Dataset`, a `Data`; or a mapping with "train" and
            perhaps "test" and "valid" of these.
        label: key of the label in dict items, or label column.
        classes: names of the classes; found by themselves where the object knows them.
        size, channels, columns: for `datasets` objects only.

    Raises:
        UserError: an object that is none of these, or a mapping without "train".
    """
    if isinstance(source, Data):
        return Source(source.train, source.test, source.valid, classes or source.classes or None, source.images)
    parts = dict(source) if isinstance(source, Mapping) else {"train": source}
    if any(_is_rows(p) for p in parts.values()):
        from limbeck.data.hub import rows_source

        read = rows_source(parts, label=label, size=size, channels=channels, columns=columns)
        read.classes = tuple(classes) if classes else read.classes
        return read
    for name, value in (("size", size), ("channels", channels), ("columns", columns)):
        if value is not None:
            raise UserError(f"{name} does nothing for a {type(source).__name__}", "scale or pick in the data itself")
    if "validation" in parts:
        parts["valid"] = parts.pop("validation")
    strange = [p for p in parts if p not in ("train", "test", "valid")]
    if "train" not in parts or strange:
        raise UserError(f"the mapping has the parts {', '.join(map(str, parts))}", "name them train, test and valid; train is needed")
    found = {name: _part(value, label) for name, value in parts.items() if value is not None}
    names = tuple(classes) if classes else _class_names(parts["train"])
    return Source(found["train"], found.get("test"), found.get("valid"), names)
