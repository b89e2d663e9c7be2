"""One part (train, valid or test) of a data set: samples by position, whole batches at a time.

Shapes: B samples in a batch, N in the split; `...` is the shape of one sample.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.data.batch import Batch, move
from limbeck.errors import UserError, nearest

LABEL_NAMES = ("labels", "label", "target", "targets", "y", "class")
"""Names under which a label is found when none is given, best first."""

_BARE = ("image", "img", "inputs", "input", "x", "features", "data")


class Split(ABC):
    """Samples of one part of a data set.

    Attributes:
        labels: `(N,)` int64 or `(N, C)` float; None when there are none. They are what batches carry, so hiding labels
            here hides them everywhere.
        augment: applied by `Batches` to the inputs of training batches; None for none.
        batch_size: that of the DataLoader the split was made from, if it was.
    """

    labels: Tensor | None = None
    augment: Callable[[Any], Any] | None = None
    batch_size: int | None = None
    random_access: ClassVar[bool] = True
    """Whether batches of any positions can be had at any time; else they come in the split's own order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, index: Tensor) -> Batch:
        """The samples at the positions `index` `(B,)`; `Batch.index` is `index`."""

    @abstractmethod
    def subset(self, index: Tensor) -> Split:
        """The samples at `index` as a split of their own, numbered from 0."""

    def with_labels(self, labels: Tensor | None) -> Split:
        """The same samples under other labels (nothing is copied)."""
        other = copy.copy(self)
        other.labels = labels
        return other

    def with_augment(self, augment: Callable[[Any], Any] | None) -> Split:
        """The same samples with another augmentation."""
        other = copy.copy(self)
        other.augment = augment
        return other

    def to(self, device: torch.device | str) -> Split:
        """The split with what it holds in memory on a device; splits that hold nothing return themselves."""
        return self


class TensorSplit(Split):
    """Samples held in memory; a batch is one indexing operation.

    Args:
        inputs: `(N, ...)` tensor, or a dict of such tensors. `uint8` pictures come out as float32 in [0, 1].
        labels: `(N,)` int64, `(N, C)` float, or None.

    Raises:
        UserError: inputs and labels differ in length.
    """

    def __init__(self, inputs: Tensor | dict[str, Tensor], labels: Tensor | None = None) -> None:
        self.inputs, self.labels = inputs, labels
        for name, tensor in self.tensors().items():
            if tensor.ndim == 0 or len(tensor) != len(self):
                raise UserError(f"{name} has shape {tuple(tensor.shape)} but there are {len(self)} samples", "give one row a sample")

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the split by name, labels included."""
        named = dict(self.inputs) if isinstance(self.inputs, dict) else {"inputs": self.inputs}
        return named if self.labels is None else {**named, "labels": self.labels}

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())) if isinstance(self.inputs, dict) else self.inputs)

    def batch(self, index: Tensor) -> Batch:
        """The samples at `index`; it is moved to the device of the tensors."""
        index = index.to(self.device)
        if isinstance(self.inputs, dict):
            inputs: Any = {name: value.index_select(0, index) for name, value in self.inputs.items()}
        else:
            inputs = self.inputs.index_select(0, index)
            if inputs.dtype == torch.uint8:
                inputs = inputs.float().div_(255)
        return Batch(inputs, None if self.labels is None else self.labels.index_select(0, index), index)

    def subset(self, index: Tensor) -> TensorSplit:
        """A copy of the samples at `index`."""
        index = index.to(self.device)
        pick = lambda value: value.index_select(0, index)  # noqa: E731
        inputs = {k: pick(v) for k, v in self.inputs.items()} if isinstance(self.inputs, dict) else pick(self.inputs)
        other = TensorSplit(inputs, None if self.labels is None else pick(self.labels))
        other.augment = self.augment
        return other

    @property
    def device(self) -> torch.device:
        """Where the samples lie."""
        return next(iter(self.tensors().values())).device

    def to(self, device: torch.device | str) -> TensorSplit:
        """The split on a device: batches are then made there."""
        other = copy.copy(self)
        other.inputs, other.labels = move(self.inputs, device), move(self.labels, device)
        return other


def label_name(names: Mapping[str, Any] | list[str], given: str | None, where: str) -> str | None:
    """The name of the label among `names`: the given one, else the first of `LABEL_NAMES` that is there, else None.

    Raises:
        UserError: the given name is not there; the nearest ones are offered.
    """
    if given is None:
        return next((name for name in LABEL_NAMES if name in names), None)
    if given not in names:
        raise UserError(f"{where} has no label column {given!r}", f"did you mean {' or '.join(map(repr, nearest(given, names)))}?")
    return given


def check_columns(columns: Iterable[str] | None, names: Iterable[str], where: str) -> None:
    """Every column that was asked for must be among `names`.

    Raises:
        UserError: one is not there; the nearest ones are offered.
    """
    names = list(names)
    for column in columns or ():
        if column not in names:
            raise UserError(f"{where} has no column {column!r}", f"did you mean {' or '.join(map(repr, nearest(column, names)))}?")


def as_batch(value: Any, label: str | None = None) -> Batch:
    """A Batch from whatever a collate function returned: a Batch, `(x, y, ...)`, a dict with a label key, or x alone.

    Further items of a tuple are kept in `extra` as `item_2`, `item_3`, ...; a dict with one input under a general name
    ("image", "x", ...) becomes that tensor, other dicts stay dicts and reach the model as keyword arguments.
    """
    if isinstance(value, Batch):
        return value
    if isinstance(value, (tuple, list)):
        x, *rest = value
        return Batch(x, _as_labels(rest[0]) if rest else None, extra={f"item_{i}": v for i, v in enumerate(rest[1:], 2)})
    if isinstance(value, Mapping):
        inputs = dict(value)
        name = label_name(inputs, label, "the batch")
        labels = _as_labels(inputs.pop(name)) if name else None
        only = next(iter(inputs)) if len(inputs) == 1 else None
        return Batch(inputs[only] if only in _BARE else inputs, labels)
    return Batch(value)


def _as_labels(labels: Any) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return labels.long() if labels.ndim == 1 else labels.float()


class DatasetSplit(Split):
    """A map-style torch Dataset; items are fetched and collated batch by batch.

    Args:
        dataset: anything with `__len__` and `__getitem__`; items are `(x, y, ...)`, dicts with a label, or x alone.
        collate: joins a list of items; torch's default when None.
        label: the label's key in dict items; found by itself when None.

    Raises:
        UserError: (on access) samples of different shapes.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None = None, label: str | None = None) -> None:
        from torch.utils.data import default_collate

        self.dataset, self.collate, self.label = dataset, collate or default_collate, label

    def __len__(self) -> int:
        return len(self.dataset)

    def _fetch(self, index: Tensor) -> Batch:
        positions = index.tolist()
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(positions)
        else:
            items = [self.dataset[i] for i in positions]
        try:
            joined = self.collate(items)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"samples cannot be joined into a batch: {error}", "make them equal in shape, or give a collate_fn") from error
        return as_batch(joined, self.label).replace(index=index)

    def batch(self, index: Tensor) -> Batch:
        """The samples at `index`, under the labels that were set with `with_labels` if any."""
        batch = self._fetch(index.cpu())
        return batch if self.labels is None else batch.replace(labels=self.labels.index_select(0, index.cpu()))

    def read_labels(self) -> Tensor | None:
        """All labels, read once: from `dataset.targets` where torchvision's habit is kept, else by a pass over the items."""
        targets = getattr(self.dataset, "targets", None)
        if targets is not None and len(targets) == len(self):
            return _as_labels(targets)
        found = [self._fetch(index).labels for index in torch.arange(len(self)).split(256)]
        return None if not found or found[0] is None else torch.cat(found)  # type: ignore[arg-type]

    def subset(self, index: Tensor) -> DatasetSplit:
        """The items at `index`; nothing is read yet."""
        from torch.utils.data import Subset

        other = copy.copy(self)
        other.dataset = Subset(self.dataset, index.tolist())
        other.labels = None if self.labels is None else self.labels.index_select(0, index)
        return other


class LoaderSplit(Split):
    """An iterable-style DataLoader: batches come only in the loader's own order, and cannot be picked by position.

    Args:
        loader: yields batches in any form that `as_batch` reads.
        label: the label's key in dict batches.

    One pass is made when it is opened, to count batches and samples and to read the labels.
    """

    random_access = False

    def __init__(self, loader: Any, label: str | None = None) -> None:
        self.loader, self.label = loader, label
        sizes, labels = [], []
        for batch in self:
            sizes.append(len(batch))
            labels.append(batch.labels)
        self.steps, self.samples = len(sizes), sum(sizes)
        self.labels = torch.cat(labels) if labels and labels[0] is not None else None

    def __iter__(self) -> Iterator[Batch]:
        return (as_batch(value, self.label) for value in self.loader)

    def __len__(self) -> int:
        return self.samples

    def batch(self, index: Tensor) -> Batch:
        """Only the first samples can be had (`index` = 0, 1, ...), for dry passes.

        Raises:
            UserError: other positions are asked for.
        """
        first = next(iter(self))
        count = len(index)
        if index.tolist() != list(range(count)) or count > len(first):
            raise UserError("an iterable loader has no sample positions", "give a map-style Dataset or tensors instead")
        cut = lambda v: v[:count] if isinstance(v, Tensor) else v  # noqa: E731
        inputs = {k: cut(v) for k, v in first.inputs.items()} if isinstance(first.inputs, dict) else cut(first.inputs)
        return Batch(inputs, cut(first.labels))

    def with_labels(self, labels: Tensor | None) -> Split:
        """Not possible: labels come with the loader's own batches.

        Raises:
            UserError: always.
        """
        raise UserError("the labels of an iterable loader cannot be hidden or changed", "give a map-style Dataset or tensors instead")

    def subset(self, index: Tensor) -> Split:
        """Not possible.

        Raises:
            UserError: always.
        """
        raise UserError("an iterable loader cannot be split", "give train, test and valid each on its own, or a map-style Dataset")
