"""Questions and the documents that answer them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.data.split import Split
from limbeck.data.text.notion import Text
from limbeck.data.text.pairs import pad_rows
from limbeck.data.text.ragged import Ragged


class RetrievalSplit(Split):
    """Row i is a query and the document that belongs to it.

    Args:
        columns: `query`, `document` (ids with the tokenizer's own special tokens), `query_text`, `document_text` (UTF-8).
        text: the tokenizer and what belongs to it; both sides are cut at `length`, their last token stays.
        rows: positions in the columns; None for all.
    """

    def __init__(self, columns: Mapping[str, Ragged], text: Text, rows: np.ndarray | None = None) -> None:
        self.columns, self.text, self.length = dict(columns), text, text.length
        self.rows = np.arange(len(self.columns["query"])) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def _side(self, name: str, rows: list[int]) -> dict[str, Tensor]:
        found = []
        for row in rows:
            ids = self.columns[name][row]
            found.append(ids if len(ids) <= self.length else np.append(ids[: self.length - 1], ids[-1]))
        ids, mask = pad_rows(found, self.text.pad)
        return {"input_ids": ids, "attention_mask": mask}

    def batch(self, index: Tensor) -> Batch:
        """`{"query": ..., "document": ...}`, each with `input_ids` and `attention_mask`; no labels."""
        rows = self.rows[index.cpu().numpy()].tolist()
        return Batch({name: self._side(name, rows) for name in ("query", "document")}, None, index.cpu())

    def texts(self, index: Tensor) -> list[tuple[str, str]]:
        """(query, document) of each row as they were given, not cut."""
        rows = self.rows[index.cpu().numpy()].tolist()
        return [(self.columns["query_text"].text(row), self.columns["document_text"].text(row)) for row in rows]

    def subset(self, index: Tensor) -> RetrievalSplit:
        """The rows at `index`; no token is copied."""
        other = copy.copy(self)
        other.rows = self.rows[index.cpu().numpy()]
        return other

    def by_length(self) -> Tensor:
        """`(N,)` positions from the pair with the fewest tokens to the one with the most: batches in this order are padded least."""
        sizes = sum(np.minimum(self.columns[name].lengths()[self.rows], self.length) for name in ("query", "document"))
        return torch.from_numpy(np.argsort(sizes, kind="stable"))

    @property
    def cut(self) -> int:
        """How many rows have a side longer than `length`."""
        long = [self.columns[name].lengths()[self.rows] > self.length for name in ("query", "document")]
        return int((long[0] | long[1]).sum())

    @property
    def domains(self) -> Tensor | None:
        """`(N,)` int64 domain of each row, None without domains."""
        if "domain" not in self.columns:
            return None
        return torch.from_numpy(np.asarray(self.columns["domain"].flat)[self.rows].astype(np.int64))
