"""Which column of a record is what."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from limbeck.data.split import LABEL_NAMES
from limbeck.data.text.rows import Row
from limbeck.errors import UserError, nearest, unknown

USUAL: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations", "dialogue"),
    "prompt": ("prompt", "instruction", "question", "source", "input"),
    "completion": ("completion", "response", "answer", "output", "target", "reference"),
    "query": ("query", "anchor"),
    "document": ("document", "positive", "passage"),
    "text": ("text", "content", "document", "sentence", "body"),
    "label": LABEL_NAMES,
}
"""Names under which a column is found when none is given, best first."""

_SHAPES = {
    "chat": ("messages",),
    "pair": ("prompt", "completion"),
    "retrieval": ("query", "document"),
    "labelled": ("text", "label"),
    "text": ("text",),
}
_KIND = {"chat": "causal-lm", "pair": "causal-lm", "retrieval": "embedding", "labelled": "classification", "text": "causal-lm"}
_TASKS = {
    "causal-lm": ("pair", "text"),
    "seq2seq": ("pair",),
    "embedding": ("retrieval", "pair"),
    "classification": ("labelled",),
    "auto": ("pair", "retrieval", "text"),
}


@dataclass(frozen=True)
class Reading:
    """What the rows are ("pair", "text", ...), what they are for, and the column of each role."""

    shape: str
    kind: str
    columns: dict[str, str]

    def mark(self) -> list[Any]:
        """JSON that changes with it."""
        return [self.shape, sorted(self.columns.items())]


def reading(name: str, there: list[str], given: dict[str, str] | None, chat: bool, label: str | None, task: str) -> Reading:
    """How the records of a source are read.

    Args:
        name: of the source, for messages.
        there: its columns.
        given: columns by role, where names are unusual.
        chat: rows hold conversations.
        label: column of the class.
        task: "auto" or a kind.

    Raises:
        UserError: a role that does not exist, a column that is not there (the nearest are offered), or no usable columns.
    """
    given = dict(given or {}) | ({"label": label} if label is not None else {})
    for role, column in given.items():
        if role not in USUAL:
            raise unknown("role of a column", role, USUAL)
        if column not in there:
            offer = " or ".join(map(repr, nearest(column, there)))
            raise UserError(f"{name} has no column {column!r} for the {role}", f"did you mean {offer}? its columns are {', '.join(there)}")
    found = {role: given.get(role) or next((n for n in usual if n in there), None) for role, usual in USUAL.items()}
    shapes = ("chat",) if chat else _TASKS[task]
    if not chat and task == "auto" and given:
        shapes = tuple(sorted((*shapes, "labelled"), key=lambda s: -len(set(_SHAPES[s]) & set(given))))
    for shape in shapes:
        if all(found[role] for role in _SHAPES[shape]):
            return Reading(shape, _KIND[shape], {role: found[role] or "" for role in _SHAPES[shape]})
    wanted = " or ".join(" + ".join(_SHAPES[shape]) for shape in shapes)
    missing = next(role for role in _SHAPES[shapes[0]] if not found[role])
    offer = ", ".join(map(repr, nearest(missing, there))) or "nothing"
    raise UserError(
        f"{name} has no {wanted}; its columns are {', '.join(there)}", f"name them, such as columns: {{{missing}: {offer.split(', ')[0]}}}"
    )


def _string(record: dict[str, Any], column: str, place: str) -> str:
    value = record.get(column)
    if value is None and column not in record:
        there = ", ".join(map(repr, record)) or "nothing"
        raise UserError(f"{place} has no {column!r}; it has {there}", "every row needs the same columns")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"the {column!r} of {place} is a {type(value).__name__}, not a text", "write it as a string")
    return value


def to_row(record: dict[str, Any], place: str, how: Reading, classes: tuple[str, ...]) -> Row:
    """A record as a row.

    Raises:
        UserError: a column is missing in this record, or is no text.
    """
    if how.shape == "chat":
        messages = record.get(how.columns["messages"])
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except ValueError:
                messages = None
        return Row(messages=messages, place=place)
    roles = {role: _string(record, column, place) for role, column in how.columns.items() if role != "label"}
    if how.shape == "labelled":
        return Row(text=roles["text"], label=classes.index(str(record[how.columns["label"]])), place=place)
    return Row(**roles, place=place)
