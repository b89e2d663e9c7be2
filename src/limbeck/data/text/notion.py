"""What belongs to a data set of texts besides its rows: the tokenizer, its special tokens and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Text:
    """The tokenizer of a data set and what belongs to it.

    Attributes:
        tokenizer: a transformers tokenizer.
        kind: "causal-lm", "seq2seq", "embedding" or "classification".
        length: the most tokens of a sample.
        vocabulary: how many tokens there are, `len(tokenizer)`.
        domains: names of the domains; empty when there is one.
        mark: digest of the tokenizer: equal exactly when texts become the same tokens.
        pad, eos, bos: ids of the special tokens; `bos` is None where there is none.
    """

    tokenizer: Any = field(repr=False)
    kind: str
    length: int
    vocabulary: int
    domains: tuple[str, ...] = ()
    mark: str = ""
    pad: int = 0
    eos: int = 0
    bos: int | None = None

    @cached_property
    def sizes(self) -> np.ndarray | None:
        """`(V,)` int64 bytes of text that each token stands for, special tokens 0; None where tokens do not tell (words, WordPiece)."""
        from limbeck.data.text.tokens import token_bytes

        return token_bytes(self.tokenizer)
