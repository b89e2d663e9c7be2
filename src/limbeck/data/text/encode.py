"""From rows to token ids: what is stored of each kind of row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from limbeck.data.text.chat import encode_chat
from limbeck.data.text.ragged import encoded
from limbeck.data.text.rows import Row
from limbeck.data.text.table import grouped
from limbeck.data.text.tokens import eos_of
from limbeck.errors import UserError

Arrays = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Encoder:
    """Rows of one shape to arrays by column.

    Attributes:
        tokenizer: a transformers tokenizer.
        shape: what the rows are, as `Corpus.shape`.
        kind: of the task.
        drop_empty: leave out pairs without a completion instead of refusing them.
        domains: rows have a domain.
        reasons: rows may have a rationale and a teacher's answer.
    """

    tokenizer: Any
    shape: str
    kind: str
    drop_empty: bool = False
    domains: bool = False
    reasons: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """Type of each column by name."""
        ids = "uint16" if len(self.tokenizer) <= 1 << 16 else "uint32"
        if self.shape in ("text", "windows", "labelled"):
            made = {"tokens": ids}
        elif self.kind == "embedding":
            made = {"query": ids, "document": ids, "query_text": "uint8", "document_text": "uint8"}
        else:
            made = {"prompt": ids, "completion": ids, "prompt_text": "uint8", "completion_text": "uint8"}
        if self.shape == "chat":
            made["scored"] = "uint8"
        if self.shape in ("windows", "labelled") or self.reasons:
            made["label"] = "int64"
        if self.domains:
            made["domain"] = "int64"
        return made | ({"rationale": "uint8", "teacher": "uint8"} if self.reasons else {})

    def pieces(self, rows: Callable[[], Iterator[Row]]) -> Callable[[int], Iterator[tuple[int, Mapping[str, list[np.ndarray]]]]]:
        """What `write_table` asks for."""

        def after(done: int) -> Iterator[tuple[int, Arrays]]:
            for group in grouped(islice(rows(), done, None), Row.size):
                yield len(group), self.encode(group)

        return after

    def encode(self, rows: list[Row]) -> Arrays:
        """Arrays by column for some rows.

        Raises:
            UserError: an empty completion (unless `drop_empty`), query or document; a conversation that cannot be written.
        """
        if self.shape == "chat":
            made = encode_chat(self.tokenizer, rows, self.drop_empty)
        elif self.shape in ("text", "windows"):
            made = self._texts(rows)
        elif self.shape == "labelled":
            made = {"tokens": self._ids([row.text or "" for row in rows], special=True)}
        elif self.kind == "embedding":
            made = self._retrieval(rows)
        else:
            rows, made = self._pairs(rows)
        one = lambda value: np.array([-1 if value is None else value], np.int64)  # noqa: E731
        for name in ("label", "domain"):
            if name in self.columns:
                made[name] = [one(getattr(row, name)) for row in rows]
        if self.reasons:
            for name in ("rationale", "teacher"):
                made[name] = [encoded(getattr(row, name) or "") for row in rows]
        return made

    def _ids(self, texts: list[str], special: bool = False) -> list[np.ndarray]:
        return token_ids(self.tokenizer, texts, special)

    def _texts(self, rows: list[Row]) -> Arrays:
        """Documents closed by the end token, begun by the token that the tokenizer itself begins texts with."""
        begin, end = first_token(self.tokenizer), np.array([eos_of(self.tokenizer)])
        made = []
        for row, ids in zip(rows, self._ids([row.text or "" for row in rows])):
            parts = [begin, ids, end] if row.ends else [begin, ids]
            made.append(np.concatenate(parts))
        return {"tokens": made}

    def _pairs(self, rows: list[Row]) -> tuple[list[Row], Arrays]:
        full = [row for row in rows if (row.completion or "").strip()]
        if len(full) < len(rows) and not self.drop_empty:
            bad = next(row for row in rows if not (row.completion or "").strip())
            raise UserError(f"the completion of {bad.place} is empty", "fill it, or leave such rows out with drop_empty: true")
        if not full:
            return full, {name: [] for name in self.columns}
        prompts, completions = [row.prompt or "" for row in full], [row.completion or "" for row in full]
        end = np.array([eos_of(self.tokenizer)])
        if self.kind == "seq2seq":
            given = self._ids(prompts, special=True)
        else:
            begin = first_token(self.tokenizer)
            given = [np.concatenate([begin, ids]) for ids in self._ids(prompts)]
        made = {"prompt": given, "completion": [np.concatenate([ids, end]) for ids in self._ids(completions)]}
        made |= {"prompt_text": [encoded(t) for t in prompts], "completion_text": [encoded(t) for t in completions]}
        return full, made

    def _retrieval(self, rows: list[Row]) -> Arrays:
        made: Arrays = {}
        for name, other in (("query", "prompt"), ("document", "completion")):
            texts = [getattr(row, name) or getattr(row, other) or "" for row in rows]
            if (bad := next((i for i, t in enumerate(texts) if not t.strip()), None)) is not None:
                raise UserError(f"the {name} of {rows[bad].place} is empty", "fill it, or remove the row")
            made[name] = self._ids(texts, special=True)
            made[f"{name}_text"] = [encoded(t) for t in texts]
        return made


def token_ids(tokenizer: Any, texts: list[str], special: bool = False) -> list[np.ndarray]:
    """Ids of texts. What looks like a special token in a text is text: no row can end itself.

    Args:
        special: put the tokenizer's own special tokens around each text.
    """
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=special, split_special_tokens=True, return_attention_mask=False, verbose=False)
    return [np.asarray(ids, np.int64) for ids in found["input_ids"]]


def first_token(tokenizer: Any) -> np.ndarray:
    """`(1,)` the begin token where the tokenizer begins texts with it by itself, else `(0,)`."""
    ids = list(tokenizer("a")["input_ids"])
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return np.array(ids[:1] if begins else [], np.int64)
