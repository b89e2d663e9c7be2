"""Rows of different lengths in one flat array, in memory or mapped from disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """N rows of different lengths.

    Attributes:
        flat: `(T,)` all rows one after the other.
        ends: `(N,)` int64, where each row ends in `flat`.
    """

    flat: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(rows: Iterable[Sequence[int] | np.ndarray], dtype: str = "int64") -> Ragged:
        """Rows in memory."""
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        ends = np.cumsum([len(a) for a in arrays], dtype=np.int64) if arrays else np.zeros(0, np.int64)
        return Ragged(np.concatenate(arrays) if arrays else np.zeros(0, dtype), ends)

    @staticmethod
    def texts(values: Iterable[str]) -> Ragged:
        """Texts as UTF-8 bytes in memory."""
        return Ragged.of([encoded(value) for value in values], "uint8")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        start = int(self.ends[row - 1]) if row > 0 else 0
        return self.flat[start : int(self.ends[row])]

    def text(self, row: int) -> str:
        """A row of UTF-8 bytes as a text."""
        return decoded(self[row])

    def lengths(self) -> np.ndarray:
        """`(N,)` int64."""
        return np.diff(self.ends, prepend=np.int64(0))


def encoded(text: str) -> np.ndarray:
    """`(n,)` uint8: a text in UTF-8; half surrogates, which JSON can hold, survive."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)


def decoded(values: np.ndarray) -> str:
    """The text of `encoded`."""
    return bytes(values).decode("utf-8", "surrogatepass")
