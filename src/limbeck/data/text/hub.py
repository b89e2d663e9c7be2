"""Hugging Face data sets as texts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from limbeck.data.hub import open_hub
from limbeck.data.text.foreign import Records, file_identity, records_corpus
from limbeck.data.text.rows import Corpus
from limbeck.errors import UserError
from limbeck.places import user_path


def read_hub(
    path: str, shares: dict[str, float], seed: int = 0, columns: dict[str, str] | None = None, chat: bool = False,
    label: str | None = None, kind: str = "auto", streaming: bool = False, config: str | None = None,
) -> Corpus:  # fmt: skip
    """A Hugging Face data set by id, or a folder that it wrote or can read.

    Args:
        path: id or folder.
        shares, seed, columns, chat, label, kind: as `read_records`.
        streaming: read rows as they come instead of preparing the whole set first.
        config: which configuration.

    Raises:
        UserError: `datasets` is not installed, or the data set cannot be opened.
    """
    loaded = open_hub(path, config, streaming)
    parts = dict(loaded) if isinstance(loaded, dict) else {"all": loaded}
    identity, reads = _hub_identity(path, config, parts), _hub_reads(path, parts)
    return records_corpus(f"hf:{path}", identity, reads, shares, seed, columns, chat, label, kind)


def _hub_reads(path: str, parts: dict[str, Any]) -> dict[str, Records]:
    """Readers by our names of the parts; validation stands in for a test part that is not there."""
    named = {{"validation": "valid", "val": "valid", "dev": "valid"}.get(part, part): rows for part, rows in parts.items()}
    if "test" not in named and "valid" in named:
        named["test"] = named.pop("valid")
    if len(named) == 1:
        named = {"all": next(iter(named.values()))}
    elif "train" not in named or "test" not in named:
        if "train" not in named:
            raise UserError(f"{path} has no train part, only {', '.join(parts)}", "name one of them train")
        named = {"all": named["train"]}

    def read(part: str, rows: Any) -> Iterator[tuple[dict[str, Any], str]]:
        for number, record in enumerate(rows):
            yield record, f"{path}, {part} row {number}"

    return {part: partial(read, part, rows) for part, rows in named.items() if part in ("all", "train", "test", "valid")}


def _hub_identity(path: str, config: str | None, parts: dict[str, Any]) -> list[Any]:
    """What a data set is known by: the fingerprints of `datasets`; of a stream its builder's version, files and times of change."""
    marks = {}
    for part, rows in parts.items():
        mark = getattr(rows, "_fingerprint", None)
        if mark is None:
            info = rows.info
            sums = info.download_checksums or {}
            marks[part] = [str(info.version), info.builder_name, info.config_name, sorted(map(str, sums)), info.dataset_size]
        else:
            marks[part] = mark
    folder = user_path(path)
    if not folder.is_dir():
        return ["hf", config, path, marks]
    return ["hf", config, [[f.relative_to(folder).as_posix(), *file_identity(f)[1:]] for f in sorted(folder.rglob("*")) if f.is_file()]]
