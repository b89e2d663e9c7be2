"""Pictures as texts of numbers: each pixel is a word, so that a language model learns to draw."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from functools import partial

import numpy as np

from limbeck.data.text.rows import Corpus, Row, part_of

START = "start"
"""The word in front of the first pixel."""


def digit_tokens(shares: dict[str, float], seed: int = 0) -> Corpus:
    """1797 handwritten digits (8x8, scikit-learn) as 64 grey levels in words, "start 0 0 5 13 ...", row by row from the top.

    Take `text: {tokenizer: "words:32", length: 66}`: 17 levels, the start and the special tokens fit into 32 words, and a window is one
    digit: start, 64 levels, end.

    Args:
        shares, seed: of the split.
    """
    identity = ["1", "digit-tokens", shares, seed, importlib.metadata.version("scikit-learn")]
    reads = {part: partial(_rows, part, shares, seed) for part in ("train", "test", "valid") if part == "train" or shares[part]}
    return Corpus("digit-tokens", identity, reads, "text", "causal-lm")


def _rows(part: str, shares: dict[str, float], seed: int) -> Iterator[Row]:
    import sklearn.datasets

    pictures = np.asarray(sklearn.datasets.load_digits().data, dtype=np.int64)
    for number, levels in enumerate(pictures):
        if part_of(seed, str(number), shares) == part:
            yield Row(text=" ".join([START, *map(str, levels)]), place=f"digit {number}")
