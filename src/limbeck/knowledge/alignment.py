"""One text in two tokenizations: the batch that a teacher with another tokenizer reads, and where both have read the same characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data.batch import IGNORE, Batch
from limbeck.data.text import Text
from limbeck.data.text.encode import first_token
from limbeck.data.text.pairs import pad_rows
from limbeck.errors import UserError

KEPT = 200_000
"""Samples of which the other tokenization is remembered at most."""

UNKNOWN = -1
"""The place of a boundary inside a character, or where a tokenizer's text of a beginning is no beginning of its text of the whole."""


@dataclass(frozen=True)
class Tokens:
    """A text's tokens under one tokenizer, n of them.

    Attributes:
        ids: `(n,)`.
        starts, ends: `(n,)` characters of the text before and up to the end of each token; `UNKNOWN` where that is inside a character.
            The end token lies behind the last character: its end is one more than the text is long.
        scored: `(n,)` bool.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    scored: np.ndarray


@dataclass(frozen=True)
class Aligned:
    """A teacher's batch and what its law shares with the student's.

    Attributes:
        batch: in the teacher's tokens.
        student, teacher: `(P,)` rows of the two laws that speak of what follows the same characters.
        student_chunk, teacher_chunk: `(N,)` and `(M,)` for every row of the two laws the number of the piece of text, between two
            neighbouring shared boundaries, that its token is part of; -1 for tokens that are in none.
        chunks: how many such pieces there are.
    """

    batch: Batch
    student: Tensor
    teacher: Tensor
    student_chunk: Tensor
    teacher_chunk: Tensor
    chunks: int


class Aligner:
    """Writes batches of a student's tokens in a teacher's tokens.

    Args:
        student, teacher: tokenizer of each side and what belongs to it.

    Raises:
        UserError: a tokenizer that does not tell where its tokens are in a text (one that is not "fast").
    """

    def __init__(self, student: Text, teacher: Text) -> None:
        self.student, self.teacher = student, teacher
        if not getattr(teacher.tokenizer, "is_fast", False):
            raise UserError(
                f"the teacher's tokenizer ({type(teacher.tokenizer).__name__}) does not tell where its tokens are in a text",
                "save it as a fast tokenizer (a tokenizer.json)",
            )
        self._begin = first_token(teacher.tokenizer)
        self._kept: dict[int, tuple[Tokens, Tokens, np.ndarray]] = {}

    def __call__(self, batch: Batch) -> Aligned:
        """The same texts in the teacher's tokens; samples with an index are read once."""
        seq2seq = self.student.kind == "seq2seq"
        ids, labels = batch.inputs["input_ids"].cpu().numpy(), batch.labels.cpu().numpy()  # type: ignore[union-attr]
        mask = batch.inputs.get("attention_mask")
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        numbers = [None] * len(ids) if batch.index is None else batch.index.tolist()
        samples = []
        for number, row, own, length in zip(numbers, ids, labels, lengths):
            found = None if number is None else self._kept.get(number)
            if found is None:
                found = self._pair(row[: int(length)], own, seq2seq)
                if number is not None and len(self._kept) < KEPT:
                    self._kept[number] = found
            samples.append(found)
        return self._together(samples, batch, seq2seq)

    # ---- one sample ----

    def _pair(self, ids: np.ndarray, labels: np.ndarray, seq2seq: bool) -> tuple[Tokens, Tokens, np.ndarray]:
        """(the student's tokens, the teacher's, the teacher's source)."""
        if seq2seq:
            own = labels[labels != IGNORE]
            source = _decode(self.student.tokenizer, ids)
            given = np.asarray(self.teacher.tokenizer(source, add_special_tokens=True)["input_ids"], np.int64)[: self.teacher.length]
            text, mine = self._mine(own, np.ones(len(own), bool))
            return mine, self._theirs(text, mine, np.zeros(0, np.int64)), given
        scored = labels[: len(ids)] != IGNORE
        scored[:1] = False
        text, mine = self._mine(ids, scored)
        return mine, self._theirs(text, mine, self._begin), np.zeros(0, np.int64)

    def _mine(self, ids: np.ndarray, scored: np.ndarray) -> tuple[str, Tokens]:
        """(the text of the student's tokens, the tokens with their places); found by decoding every beginning of the row."""
        coder = self.student.tokenizer
        text = _decode(coder, ids)
        beginnings = [_decode(coder, ids[: n + 1]) for n in range(len(ids))]
        ends = [len(t) if text.startswith(t) and not t.endswith("\ufffd") else UNKNOWN for t in beginnings]
        if len(ids) and int(ids[-1]) == self.student.eos:
            ends[-1] = len(text) + 1
            if len(ends) > 1:
                ends[-2] = len(text)
        starts = [0, *ends[:-1]] if ends else []
        return text, Tokens(ids, np.asarray(starts, np.int64), np.asarray(ends, np.int64), scored)

    def _theirs(self, text: str, mine: Tokens, begin: np.ndarray) -> Tokens:
        """The teacher's tokens of the text; scored is what lies within what the student's scored tokens write."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True, "verbose": False}
        found = self.teacher.tokenizer(text, **options)
        spans = found["offset_mapping"]
        left, right = [s for s, _ in spans], [e for _, e in spans]
        ids = [*begin.tolist(), *found["input_ids"]]
        # a token that begins before another one ends shares a character with it
        ends = [e if n + 1 == len(spans) or left[n + 1] >= e else UNKNOWN for n, e in enumerate(right)]
        starts = [0, *ends[:-1]] if ends else []
        places = list(zip(starts, ends))
        if len(mine.ids) and int(mine.ids[-1]) == self.student.eos:
            ids.append(self.teacher.eos)
            places.append((len(text), len(text) + 1))
            left, right = [*left, len(text)], [*right, len(text) + 1]
        allowed = _written(mine, len(text) + 1)
        scored = [bool(allowed[s:e].all()) if e > s else False for s, e in zip(left, right)]
        places = [(0, 0)] * len(begin) + places
        scored = [False] * len(begin) + scored
        most = self.teacher.length
        first = [s for s, _ in places][:most]
        last = [e for _, e in places][:most]
        kept = np.asarray(scored, bool)[:most]
        if self.teacher.kind != "seq2seq":
            kept[:1] = False
        return Tokens(np.asarray(ids, np.int64)[:most], np.asarray(first, np.int64), np.asarray(last, np.int64), kept)

    # ---- a batch ----

    def _together(self, samples: Sequence[tuple[Tokens, Tokens, np.ndarray]], batch: Batch, seq2seq: bool) -> Aligned:
        labels = pad_rows([np.where(t.scored, t.ids, IGNORE) for _, t, _ in samples], IGNORE)[0]
        ids, mask = pad_rows([source if seq2seq else t.ids for _, t, source in samples], self.teacher.pad)
        pairs: list[tuple[int, int]] = []
        chunk_of: tuple[list[int], list[int]] = ([], [])
        count, rows = 0, [0, 0]
        for mine, theirs, _ in samples:
            own, other = _scored(mine), _scored(theirs)
            first, second = ({s: n for n, (s, _) in enumerate(side) if s != UNKNOWN} for side in (own, other))
            pairs += [(rows[0] + first[place], rows[1] + second[place]) for place in sorted(first.keys() & second.keys())]
            bounds = _shared(own, other)
            for side, found in zip((own, other), chunk_of):
                found += _numbered(side, bounds, count)
            count += len(bounds)
            rows = [rows[0] + len(own), rows[1] + len(other)]
        device = batch.inputs["input_ids"].device
        put = lambda values: torch.tensor(values, dtype=torch.int64, device=device)  # noqa: E731
        made = Batch({"input_ids": ids, "attention_mask": mask}, labels, batch.index).to(device)
        return Aligned(made, put([a for a, _ in pairs]), put([b for _, b in pairs]), put(chunk_of[0]), put(chunk_of[1]), count)


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _written(tokens: Tokens, size: int) -> np.ndarray:
    """`(size,)` bool: the characters (and, last, the end) that scored tokens write.

    Tokens that share a character are taken together: they write it where all of them are scored.
    """
    allowed, done = np.zeros(size, bool), 0
    state = True
    for end, scored in zip(tokens.ends.tolist(), tokens.scored.tolist()):
        state = state and scored
        if end != UNKNOWN:
            allowed[done:end] = state
            done, state = max(done, end), True
    return allowed


def _scored(tokens: Tokens) -> list[tuple[int, int]]:
    return [(s, e) for s, e, on in zip(tokens.starts.tolist(), tokens.ends.tolist(), tokens.scored.tolist()) if on]


def _shared(own: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces (start, end) between neighbouring boundaries that both sides have."""
    starts = {s for s, _ in own} & {s for s, _ in other} - {UNKNOWN}
    ends = {e for _, e in own} & {e for _, e in other} - {UNKNOWN}
    places = sorted(starts | ends)
    return [(a, b) for a, b in pairwise(places) if a in starts and b in ends]


def _numbered(side: list[tuple[int, int]], bounds: list[tuple[int, int]], first: int) -> list[int]:
    """The piece of each token, counted from `first`; a token without a known start goes on with the piece before it."""
    begins = {a: (n, b) for n, (a, b) in enumerate(bounds, first)}
    found, current, stop = [], -1, UNKNOWN
    for start, end in side:
        if start != UNKNOWN and start in begins:
            current, stop = begins[start]
        elif start != UNKNOWN and (current < 0 or start >= stop):
            current = -1
        found.append(current)
        if end != UNKNOWN and current >= 0 and end >= stop:
            current = -1
    return found
