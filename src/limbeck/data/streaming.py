"""Sets larger than memory: rows that are read as they come, mixed in windows, in an order that is arithmetic.

An epoch's order has two levels. The pieces (row groups of Parquet files, shards of a hub's stream) come in a permutation that depends on
(seed, epoch). The rows in that order are cut into windows of `buffer` rows, and each window is permuted by (seed, epoch, window). Nothing
of this has a state: the batch at step k is found again by going to its window, so a resumed run sees the very rows that it would have seen.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.data.choose import generator
from limbeck.data.split import Split, TensorSplit
from limbeck.errors import UserError

Piece = tuple[np.ndarray | None, Any]
"""Row numbers (None where a source cannot tell) and a `pyarrow.Table` of as many rows."""


class Rows(ABC):
    """Where rows come from.

    Attributes:
        count: rows in all.
        schema: their `pyarrow` schema.
    """

    count: int
    schema: Any

    @abstractmethod
    def ordered(self, seed: int, epoch: int, shuffle: bool, first: int) -> Iterator[Piece]:
        """The rows of an epoch from place `first` of its order on, piece by piece."""

    @abstractmethod
    def take(self, numbers: np.ndarray) -> Any:
        """A table of the rows of these numbers, in this order."""

    @abstractmethod
    def without(self, count: int) -> tuple[Any, Rows]:
        """(a table of `count` rows, the source without them)."""

    @abstractmethod
    def mark(self) -> Any:
        """What stands for the content; JSON can hold it."""


class StreamSplit(Split):
    """Rows of a set that is larger than memory; memory holds one window and one piece.

    Args:
        rows: where they come from.
        decode: makes inputs and labels of a table.
        buffer: rows of a window, within which they are mixed.
    """

    random_access = False

    def __init__(self, rows: Rows, decode: Callable[[Any], tuple[Any, Tensor | None]], buffer: int) -> None:
        if buffer < 1:
            raise UserError(f"buffer is {buffer}", "give at least 1 row")
        self.rows, self.decode, self.buffer = rows, decode, buffer
        self.scale: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.rows.count

    def hold_out(self, count: int) -> tuple[TensorSplit, StreamSplit]:
        """(`count` rows in memory, the others): for a test or validation part."""
        table, rest = self.rows.without(count)
        other = copy.copy(self)
        other.rows = rest
        return TensorSplit(*self.decode(table)), other

    def batch(self, index: Tensor) -> Batch:
        """The rows at `index`: what a dry pass or `limbeck cache` reads; training goes through `batches`."""
        return self._batch(self.rows.take(index.cpu().numpy()), index)

    def batches(self, seed: int, epoch: int, size: int, start: int, shuffle: bool, drop_last: bool) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on; arguments as of `limbeck.data.Batches`."""
        window = -(-self.buffer // size) * size  # whole batches, so that a step's window is plain division
        number, skip = divmod(start * size, window)
        for positions, table in self._windows(seed, epoch, shuffle, number, window):
            order = np.arange(table.num_rows)
            if shuffle:
                order = torch.randperm(table.num_rows, generator=generator(seed, epoch, 1 + number)).numpy()
            for first in range(skip, len(order), size):
                pick = order[first : first + size]
                if len(pick) == size or not drop_last:
                    yield self._batch(table.take(pick), None if positions is None else torch.from_numpy(positions[pick]))
            number, skip = number + 1, 0
            del positions, table  # before the next window is read

    def _windows(self, seed: int, epoch: int, shuffle: bool, first: int, size: int) -> Iterator[Piece]:
        import pyarrow

        held: list[Piece] = []
        for numbers, table in self.rows.ordered(seed, epoch, shuffle, first * size):
            while table.num_rows:
                room = size - sum(part.num_rows for _, part in held)
                held.append((None if numbers is None else numbers[:room], table.slice(0, room)))
                numbers, table = None if numbers is None else numbers[room:], table.slice(room)
                if sum(part.num_rows for _, part in held) == size:
                    joined, held = _joined(held, pyarrow), []  # its parts are let go before it is used
                    yield joined
                    del joined
        if held:
            yield _joined(held, pyarrow)

    def _batch(self, table: Any, index: Tensor | None) -> Batch:
        inputs, labels = self.decode(table)
        if self.scale is not None:
            inputs = (inputs - self.scale[0]) / self.scale[1]
        scaled = {k: _scaled(v) for k, v in inputs.items()} if isinstance(inputs, dict) else _scaled(inputs)
        return Batch(scaled, labels, index)

    def standardise(self) -> tuple[Tensor, Tensor]:
        """Scale the columns of a table by their mean and deviation from now on; one pass over the rows (Chan's formula joins the pieces).

        Returns:
            mean and deviation, for the other parts.
        """
        count, mean, square = 0, torch.zeros(()), torch.zeros(())
        for _, table in self.rows.ordered(0, 0, False, 0):
            values = self.decode(table)[0].double()
            own = values.mean(0)
            delta, total = own - mean, count + len(values)
            square = square + (values - own).square().sum(0) + delta.square() * count * len(values) / total
            mean, count = mean + delta * len(values) / total, total
        deviation = (square / count).sqrt()
        self.scale = mean.float(), torch.where(deviation > 0, deviation, torch.ones_like(deviation)).float()
        return self.scale

    def subset(self, index: Tensor) -> Split:
        """Not possible: a stream is not cut by position.

        Raises:
            UserError: always.
        """
        raise UserError("a stream cannot be cut by sample", "leave data.train and data.labelled out, or give the shards that you want")

    def with_labels(self, labels: Tensor | None) -> Split:
        """Not possible: labels come with the rows.

        Raises:
            UserError: always.
        """
        raise UserError("the labels of a stream cannot be hidden or changed", "leave data.labelled and data.label_noise out")


def _joined(parts: list[Piece], pyarrow: Any) -> Piece:
    numbers = None if parts[0][0] is None else np.concatenate([own for own, _ in parts])
    return numbers, pyarrow.concat_tables([table for _, table in parts]).combine_chunks()


def _scaled(value: Tensor) -> Tensor:
    return value.float().div_(255) if value.dtype == torch.uint8 else value
