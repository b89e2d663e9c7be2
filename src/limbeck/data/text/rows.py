"""What a source of texts hands over: rows, by part, in an order that never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

KINDS = ("causal-lm", "seq2seq", "embedding", "classification")


@dataclass(frozen=True)
class Row:
    """One text, one pair, one question with its document, or one conversation.

    Attributes:
        text: a plain text.
        prompt, completion: what is given, and what is to be written.
        query, document: a question and the text that answers it.
        messages: a conversation, `[{"role": ..., "content": ...}, ...]`.
        label: number of the class of `text`.
        domain: number of the domain.
        rationale, teacher: a reason in words and a teacher's answer, where a source has them.
        ends: False where the next row goes on with the same text.
        place: where the row is from, for messages.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    query: str | None = None
    document: str | None = None
    messages: Any = None
    label: int | None = None
    domain: int | None = None
    rationale: str | None = None
    teacher: str | None = None
    ends: bool = True
    place: str = ""

    def size(self) -> int:
        """Characters of all texts."""
        texts = (self.text, self.prompt, self.completion, self.query, self.document)
        return sum(len(t) for t in texts if t) + (len(str(self.messages)) if self.messages else 0)

    def texts(self) -> list[str]:
        """Every text of the row: what a tokenizer is trained on."""
        own = [self.text, self.prompt, self.completion, self.query, self.document, self.rationale]
        own += [str(m.get("content") or "") for m in self.messages or ()]
        return [t for t in own if t]


@dataclass
class Corpus:
    """A source of texts, split into parts.

    Attributes:
        name: what it was opened as.
        identity: JSON that changes whenever the rows change: names, sizes and checksums, split arguments.
        parts: by name ("train", "test", "valid"), a function that gives the rows from the beginning.
        shape: what the rows are: "text", "pair", "retrieval", "chat" or "labelled".
        kind: the task that the source is made for.
        domains, classes: names.
        derived: parts were drawn here; False where the source has parts of its own.
        reasons: rows have rationales and a teacher's answers.
    """

    name: str
    identity: Any
    parts: dict[str, Callable[[], Iterator[Row]]]
    shape: str
    kind: str
    domains: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    derived: bool = True
    reasons: bool = False


def draw(*words: Any) -> float:
    """A number in [0, 1) that depends on the words alone: the same on every machine."""
    text = "\x1f".join(map(str, words)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def part_of(seed: int, name: str, shares: dict[str, float]) -> str:
    """The part of one row or file among many: test with the probability `shares["test"]`, and so on; the rest is train."""
    if draw(seed, "test", name) < shares["test"]:
        return "test"
    return "valid" if draw(seed, "valid", name) < shares["valid"] else "train"


def divide(sizes: dict[str, int], shares: dict[str, float], seed: int) -> dict[str, str]:
    """The part of each package: whole packages go to test and valid until those have their share of the size.

    Args:
        sizes: bytes by package.
        shares: of "test" and "valid".
        seed: of the order in which packages are asked.

    A package larger than a part's whole share stays in train while there is another. The share of valid does not change what goes to test.
    """
    parts = dict.fromkeys(sizes, "train")
    total = sum(sizes.values())
    for part in ("test", "valid"):
        wanted, have = shares[part] * total, 0.0
        free = sorted((n for n in sizes if parts[n] == "train"), key=lambda n: (sizes[n] > wanted, draw(seed, part, n)))
        for name in free:
            if have >= wanted:
                break
            if have + sizes[name] <= 1.25 * wanted or not have:
                parts[name] = part
                have += sizes[name]
    return parts
