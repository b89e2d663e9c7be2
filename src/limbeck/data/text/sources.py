"""Every source of texts by name."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.data.text import domains, foreign, hub, pixels, stdlib, words
from limbeck.data.text.rows import Corpus

EMBEDDED: dict[str, Callable[..., Corpus]] = {
    "stdlib-text": stdlib.stdlib_text,
    "stdlib-docstrings": stdlib.stdlib_docstrings,
    "stdlib-completion": stdlib.stdlib_completion,
    "stdlib-explain": stdlib.stdlib_explain,
    "stdlib-retrieval": stdlib.stdlib_retrieval,
    "stdlib-windows": stdlib.stdlib_windows,
    "stdlib-domains": domains.stdlib_domains,
    "tables-in-words": words.tables_in_words,
    "digit-tokens": pixels.digit_tokens,
}
"""Embedded texts by name."""

FOREIGN: dict[str, Callable[..., Corpus]] = {
    "text": foreign.read_text_files,
    "jsonl": foreign.read_jsonl,
    "csv": foreign.read_csv,
    "parquet": foreign.read_parquet,
    "hf": hub.read_hub,
}
"""Kinds of foreign texts, written before a colon."""

TEXT_ONLY = ("text", "jsonl")
"""Kinds of `FOREIGN` that can only be texts."""

_TASKS = {"stdlib-retrieval": "embedding", "stdlib-windows": "classification", "tables-in-words": "seq2seq"}


def listing() -> list[dict[str, str]]:
    """One row for each embedded source: name, task (causal-lm, seq2seq, embedding, classification) and what it is."""
    rows = []
    for name, reader in EMBEDDED.items():
        about = (reader.__doc__ or "").splitlines()[0]
        rows.append({"name": name, "task": _TASKS.get(name, "causal-lm"), "source": about})
    return rows
