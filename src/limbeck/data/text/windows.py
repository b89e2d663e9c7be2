"""Plain texts as windows of tokens."""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from limbeck.data.batch import IGNORE, Batch
from limbeck.data.split import Split
from limbeck.data.text.notion import Text
from limbeck.data.text.ragged import Ragged


class WindowSplit(Split):
    """Windows of `length` tokens of documents that lie one after the other, each closed by the end token.

    Args:
        documents: ids, one row a document.
        text: the tokenizer and what belongs to it.
        packing: True cuts the whole stream (of each domain) every `length` tokens, and leaves out the incomplete last window unless it is
            the only one; False begins a window at every document, and a document's last window is shorter.
        numbers: `(documents,)` the domain of each document, or None; no window has two.

    Attributes:
        domains: `(N,)` int64 domain of each window, None without domains.
        starts, sizes: `(N,)` where windows begin and how long they are; None where it is a matter of arithmetic.
    """

    def __init__(self, documents: Ragged, text: Text, packing: bool = True, numbers: np.ndarray | None = None) -> None:
        self.text, self.length, self.tokens = text, text.length, documents.flat
        self.starts: np.ndarray | None = None
        self.sizes: np.ndarray | None = None
        self.domains: Tensor | None = None
        if packing and numbers is None and len(self.tokens) >= self.length:
            self._count = len(self.tokens) // self.length
            return
        stretches = self._stretches(documents, packing, numbers)
        self.starts, self.sizes, own = _cut(*stretches, self.length, packing)
        self._count = len(self.starts)
        if numbers is not None:
            self.domains = torch.from_numpy(own)

    @staticmethod
    def _stretches(documents: Ragged, packing: bool, numbers: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(begin, end, domain) of what is cut by itself: documents, or all neighbours of one domain."""
        ends = np.asarray(documents.ends)
        begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        domains = np.zeros(len(ends), np.int64) if numbers is None else np.asarray(numbers, np.int64)
        if packing and len(ends):
            first = np.flatnonzero(np.diff(domains, prepend=domains[0] - 1))
            begins, ends, domains = begins[first], ends[np.append(first[1:], len(ends)) - 1], domains[first]
        return begins, ends, domains

    def __len__(self) -> int:
        return self._count

    def _spans(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.starts is None:
            return index * self.length, np.full(len(index), self.length)
        assert self.sizes is not None
        return self.starts[index], self.sizes[index]

    def windows(self, index: Tensor) -> list[np.ndarray]:
        """The tokens of the windows at `index`, each `(length,)` or shorter."""
        starts, sizes = self._spans(index.cpu().numpy())
        return [self.tokens[s : s + n] for s, n in zip(starts.tolist(), sizes.tolist())]

    def batch(self, index: Tensor) -> Batch:
        """`input_ids` `(B, L)` and labels that are the same tokens; padded at the right where windows are shorter."""
        rows = self.windows(index)
        longest = max(len(row) for row in rows)
        ids = np.full((len(rows), longest), self.text.pad, np.int64)
        labels = np.full((len(rows), longest), IGNORE, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = labels[i, : len(row)] = row
        inputs = {"input_ids": torch.from_numpy(ids)}
        lengths = torch.tensor([len(row) for row in rows])
        if int(lengths.min()) < longest:
            inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return Batch(inputs, torch.from_numpy(labels), index.cpu())

    def subset(self, index: Tensor) -> WindowSplit:
        """The windows at `index`; no token is copied."""
        other = copy.copy(self)
        other.__dict__.pop("bytes", None)
        index = index.cpu()
        other.starts, other.sizes = self._spans(index.numpy())
        other.domains = None if self.domains is None else self.domains[index]
        other._count = len(index)
        return other

    @cached_property
    def bytes(self) -> Tensor | None:
        """`(N,)` int64: UTF-8 bytes of the scored tokens of each window (all but its first), for bits per byte; None as `Text.sizes`."""
        table = self.text.sizes
        if table is None:
            return None
        total = torch.zeros(len(self), dtype=torch.long)
        for index in torch.arange(len(self)).split(4096):
            total[index] = torch.tensor([int(table[row[1:]].sum()) for row in self.windows(index)])
        return total

    def scored_tokens(self) -> int:
        """How many tokens of the split are scored."""
        sizes = self._spans(np.arange(len(self)))[1]
        return int((sizes - 1).sum())


def _cut(
    begins: np.ndarray, ends: np.ndarray, domains: np.ndarray, length: int, packing: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, sizes, domains) of the windows of several stretches."""
    starts, sizes, numbers = [], [], []
    for begin, end, domain in zip(begins.tolist(), ends.tolist(), domains.tolist()):
        own = np.arange(begin, end, length)
        own_sizes = np.minimum(end - own, length)
        keep = own_sizes == length if packing and end - begin >= length else own_sizes > 1
        starts.append(own[keep])
        sizes.append(own_sizes[keep])
        numbers.append(np.full(int(keep.sum()), domain))
    empty = np.zeros(0, np.int64)
    return tuple(np.concatenate([empty, *parts]).astype(np.int64) for parts in (starts, sizes, numbers))  # type: ignore[return-value]
