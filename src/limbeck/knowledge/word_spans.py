"""Spans of words found by regular expressions, as runs of sub-word tokens."""

from __future__ import annotations

import bisect
import re
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batch import IGNORE

PREPOSITIONS = "about|after|as|at|before|between|by|for|from|in|into|of|on|over|per|to|under|until|with|without"
SPAN = re.compile(rf"\b(?:{PREPOSITIONS})\s+(?:(?:a|an|the|this|each|its)\s+)?\w+|[^\W\d]\w*(?:\.\w+)*(?:\(\))?", re.IGNORECASE)
"""A preposition with its article and the word behind, else a word or a run of identifiers joined by dots."""


def pieces(tokenizer: Any) -> list[str]:
    """The text that each token stands for, spaces included, so that the joined pieces of a text can be searched.

    Byte-level and SentencePiece marks of a leading space become a space, WordPiece tokens without ## begin a new word, special tokens are
    a line's end. Parts of characters beyond ASCII stay as letters, which is all that a search for words needs.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    wordpiece = any(token.startswith("##") and len(token) > 2 for token in tokens if token)
    found = []
    for number, token in enumerate(tokens):
        if number in special or token is None:
            found.append("\n")
        elif wordpiece:
            found.append(token[2:] if token.startswith("##") else f" {token}")
        else:
            found.append(token.replace("\u0120", " ").replace("\u010a", "\n").replace("\u2581", " "))
    return found


def token_spans(ids: list[int], table: list[str]) -> list[tuple[int, int]]:
    """Runs [first, last] of two or more tokens that make one span of words, in order.

    Args:
        ids: tokens that follow each other.
        table: from `pieces`.
    """
    starts, place = [], 0
    for token in ids:
        starts.append(place)
        place += len(table[token])
    text, found = "".join(table[token] for token in ids), []
    for match in SPAN.finditer(text):
        first, last = bisect.bisect_right(starts, match.start()) - 1, bisect.bisect_left(starts, match.end()) - 1
        if last > first:
            found.append((first, last))
    return found


def neighbours(labels: Tensor, table: list[str]) -> tuple[Tensor, Tensor]:
    """Pairs of neighbouring tokens inside one span, as rows of the law of a batch.

    Args:
        labels: `(B, L)` of a causal batch; rows of its law are the scored labels of `labels[:, 1:]`, text by text.
        table: from `pieces`.

    Returns:
        `(M,)` the row of the first token of each pair (the second is the next row), and `(M,)` float32 weights: a mean over the pairs of
        each span, then over all spans of the batch; they sum to 1. Both empty where no span is found.
    """
    rows: list[int] = []
    weights: list[float] = []
    base = spans = 0
    for line in labels[:, 1:].cpu().tolist():
        run: list[int] = []
        for token in [*line, IGNORE]:
            if token != IGNORE:
                run.append(token)
                continue
            for first, last in token_spans(run, table):
                rows += range(base + first, base + last)
                weights += [1 / (last - first)] * (last - first)
                spans += 1
            base += len(run)
            run = []
    weight = torch.tensor(weights, dtype=torch.float32, device=labels.device) / max(spans, 1)
    return torch.tensor(rows, dtype=torch.int64, device=labels.device), weight
