"""Prompts and what is to be written after them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from limbeck.data.batch import IGNORE, Batch
from limbeck.data.split import Split
from limbeck.data.text.notion import Text
from limbeck.data.text.ragged import Ragged
from limbeck.errors import UserError


def pad_rows(rows: Sequence[np.ndarray], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """(`(B, L)` int64 rows padded with `value`, `(B, L)` int64 mask that is 1 on what is no padding)."""
    longest = max(1, *(len(row) for row in rows)) if len(rows) else 1
    padded = np.full((len(rows), longest), value, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        padded[i, place], mask[i, place] = row, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


class PairSplit(Split):
    """Prompts with completions.

    Args:
        columns: `prompt`, `completion` (ids, the completion closed by the end token), `prompt_text`, `completion_text` (UTF-8); perhaps
            `scored` (uint8, 1 where a token of the prompt is an earlier answer of a conversation), `rationale`, `teacher` (UTF-8),
            `domain`, `label` (one number a row).
        text: the tokenizer and what belongs to it.
        prompt_length: the most tokens of a prompt; None is three quarters of `length` for causal models, `length` for seq2seq.
        closing: ids that close a completion.
        rows: positions in the columns; None for all.

    A completion that does not fit behind its prompt is cut at its end and then has no end token. A prompt that is too long is cut at its
    left side where completions follow it in the same sequence, and at its right side where an encoder reads it.

    Attributes:
        cut: how many rows lose tokens that way.
        domains: `(N,)` int64 or None.
    """

    def __init__(
        self,
        columns: Mapping[str, Ragged],
        text: Text,
        prompt_length: int | None = None,
        closing: Sequence[int] | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.columns, self.text, self.length = dict(columns), text, text.length
        self.seq2seq = text.kind == "seq2seq"
        self.prompt_length = prompt_length or (self.length if self.seq2seq else max(1, 3 * self.length // 4))
        if not self.seq2seq and self.prompt_length >= self.length:
            raise UserError(
                f"prompt_length {self.prompt_length} leaves no room for completions in a length of {self.length}",
                "give less, or a larger length",
            )
        self.closing = [text.eos] if closing is None else list(closing)
        self.rows = np.arange(len(self.columns["prompt"])) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def _at(self, index: Tensor) -> list[int]:
        return self.rows[index.cpu().numpy()].tolist()

    def _prompt(self, row: int) -> np.ndarray:
        whole = self.columns["prompt"][row]
        return whole[: self.prompt_length] if self.seq2seq else whole[max(0, len(whole) - self.prompt_length) :]

    def _completion(self, row: int) -> np.ndarray:
        room = self.length if self.seq2seq else self.length - min(len(self.columns["prompt"][row]), self.prompt_length)
        return self.columns["completion"][row][:room]

    def _labels(self, row: int, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
        given = np.full(len(prompt), IGNORE, np.int64)
        if "scored" in self.columns and len(prompt):
            kept = self.columns["scored"][row][-len(prompt) :].astype(bool)
            given[kept] = prompt[kept]
        return np.concatenate([given, completion.astype(np.int64)])

    def batch(self, index: Tensor) -> Batch:
        """Causal: prompt and completion in one row, labels -100 on the prompt; seq2seq: source in `input_ids`, target in the labels."""
        pairs = [(row, self._prompt(row), self._completion(row)) for row in self._at(index)]
        if self.seq2seq:
            ids, mask = pad_rows([p for _, p, _ in pairs], self.text.pad)
            labels = pad_rows([c for _, _, c in pairs], IGNORE)[0]
            return Batch({"input_ids": ids, "attention_mask": mask}, labels, index.cpu())
        ids, mask = pad_rows([np.concatenate([p, c]) for _, p, c in pairs], self.text.pad)
        labels = pad_rows([self._labels(*pair) for pair in pairs], IGNORE)[0]
        inputs = {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}
        return Batch(inputs, labels, index.cpu())

    # ---- for writing ----

    def prompts(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, mask), each `(B, L)`: prompts padded at the left, sources (seq2seq) at the right."""
        return pad_rows([self._prompt(row) for row in self._at(index)], self.text.pad, left=not self.seq2seq)

    def prompt_texts(self, index: Tensor) -> list[str]:
        """The prompts as they were given, not cut."""
        return [self.columns["prompt_text"].text(row) for row in self._at(index)]

    def references(self, index: Tensor) -> list[str]:
        """The completions as they were given, not cut."""
        return [self.columns["completion_text"].text(row) for row in self._at(index)]

    def _optional(self, name: str) -> list[str | None] | None:
        if name not in self.columns:
            return None
        return [self.columns[name].text(row) or None for row in self.rows.tolist()]

    @property
    def rationales(self) -> list[str | None] | None:
        """A reason in words for each row, None for rows without; None where the source has none at all."""
        return self._optional("rationale")

    @property
    def teacher_answers(self) -> list[str | None] | None:
        """What the source's own teacher answers for each row; None where it has none."""
        return self._optional("teacher")

    def _numbers(self, name: str) -> Tensor | None:
        if name not in self.columns:
            return None
        return torch.from_numpy(np.asarray(self.columns[name].flat)[self.rows].astype(np.int64))

    @property
    def domains(self) -> Tensor | None:
        """`(N,)` int64 domain of each row, None without domains."""
        return self._numbers("domain")

    @property
    def classes(self) -> Tensor | None:
        """`(N,)` int64 class that the completion names, None where completions are no classes."""
        return self._numbers("label")

    # ---- other rows, other completions ----

    def subset(self, index: Tensor) -> PairSplit:
        """The rows at `index`; no token is copied."""
        other = copy.copy(self)
        for name in ("bytes", "cut"):
            other.__dict__.pop(name, None)
        other.rows = self.rows[index.cpu().numpy()]
        return other

    def with_completions(self, completions: Sequence[str]) -> PairSplit:
        """The same prompts with other completions, for example of a teacher behind an interface.

        Args:
            completions: one a row, in the split's order.

        Raises:
            UserError: another number of them, or an empty one.
        """
        if len(completions) != len(self):
            raise UserError(f"there are {len(completions)} completions for {len(self)} prompts", "give one a prompt")
        if (empty := next((i for i, c in enumerate(completions) if not c.strip()), None)) is not None:
            raise UserError(f"the completion of row {empty} is empty", "leave the row out with subset(), or ask again")
        from limbeck.data.text.encode import token_ids

        ids = token_ids(self.text.tokenizer, list(completions))
        own = {name: column for name, column in self.columns.items() if name not in ("label", "teacher", "rationale")}
        columns = {name: _picked(column, self.rows) for name, column in own.items()}
        columns["completion"] = Ragged.of([[*row, *self.closing] for row in ids])
        columns["completion_text"] = Ragged.texts(completions)
        return PairSplit(columns, self.text, self.prompt_length, self.closing)

    # ---- figures ----

    @cached_property
    def cut(self) -> int:
        """How many rows are longer than what is kept of them."""
        prompts = self.columns["prompt"].lengths()[self.rows]
        completions = self.columns["completion"].lengths()[self.rows]
        room = self.length if self.seq2seq else self.length - np.minimum(prompts, self.prompt_length)
        return int(((prompts > self.prompt_length) | (completions > room)).sum())

    @cached_property
    def bytes(self) -> Tensor | None:
        """`(N,)` int64: UTF-8 bytes of the scored tokens of each row, for bits per byte; None as `Text.sizes`."""
        table = self.text.sizes
        if table is None:
            return None
        total = []
        for row in self.rows.tolist():
            prompt, completion = self._prompt(row), self._completion(row)
            labels = completion if self.seq2seq else self._labels(row, prompt, completion)[1:]
            total.append(int(table[labels[labels != IGNORE]].sum()))
        return torch.tensor(total, dtype=torch.long)


def _picked(column: Ragged, rows: np.ndarray) -> Ragged:
    return Ragged.of([column[row] for row in rows.tolist()], str(column.flat.dtype))
