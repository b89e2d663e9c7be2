"""Texts of the user: files, folders and Hugging Face data sets, read as streams."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from limbeck import storage
from limbeck.data.text.columns import Reading, reading, to_row
from limbeck.data.text.rows import Corpus, Row, divide, part_of
from limbeck.errors import MISFITS, UserError
from limbeck.places import user_path

HASHED = 256 << 20
"""Bytes up to which a file is known by its whole content; a larger one by its size, its time and 64 blocks of it."""

PIECE = 1 << 20
"""Characters of a text file that are read at once."""

SUFFIXES = (".txt", ".md", ".rst", ".py")

Records = Callable[[], Iterator[tuple[dict[str, Any], str]]]
"""What reads (record, where it stands) from the beginning."""


def file_identity(path: Path) -> list[Any]:
    """What a file is known by; it changes with the content."""
    state = path.stat()
    if state.st_size <= HASHED:
        return [path.name, state.st_size, storage.sha256(path)]
    blocks = []
    with path.open("rb") as file:
        for i in range(64):
            file.seek((state.st_size - (1 << 16)) * i // 63)
            blocks.append(storage.sha256(file.read(1 << 16)))
    return [path.name, state.st_size, state.st_mtime_ns, storage.fingerprint(blocks)]


def _file(path: str, kind: str) -> Path:
    found = user_path(path)
    if not found.is_file():
        raise UserError(f"no file at {found}", f"check the path after {kind}:")
    return found


# ---- plain text files ----


def read_text_files(path: str, shares: dict[str, float], seed: int = 0) -> Corpus:
    """Text files of a folder (`.txt`, `.md`, `.rst`, `.py`, also in folders inside it) or that a pattern names; a file is a document.

    Folders called train, test and valid inside it are the parts; else whole files are drawn. Fewer than four files are each cut at lines.

    Raises:
        UserError: no such file, or one that is not UTF-8.
    """
    base = user_path(path)
    if base.is_dir():
        files = sorted(p for p in base.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    else:
        files = sorted(Path(p) for p in glob.glob(str(base), recursive=True) if Path(p).is_file())
        base = Path(*base.parts[:1]) if not files else Path(files[0].parent)
    if not files:
        raise UserError(f"there is no text file at {path}", f"name a folder with {', '.join(SUFFIXES)} files, or books/*.txt")
    names = [p.relative_to(base).as_posix() if p.is_relative_to(base) else p.as_posix() for p in files]
    own = {n: n.split("/")[0] for n in names if "/" in n and n.split("/")[0] in ("train", "test", "valid")}
    derived = not {"train", "test"} <= set(own.values())
    identity = ["text", [[n, *file_identity(p)[1:]] for n, p in zip(names, files)], [shares, seed] if derived else None]
    if derived and len(files) < 4:
        parts = {part: partial(_lines_of, files, part, shares) for part in ("train", "test", "valid") if part == "train" or shares[part]}
        return Corpus(f"text:{path}", identity, parts, "text", "causal-lm")
    if derived:
        own = divide({n: p.stat().st_size for n, p in zip(names, files)}, shares, seed)
    parts = {}
    for part in ("train", "test", "valid"):
        if chosen := [p for n, p in zip(names, files) if own.get(n) == part]:
            parts[part] = partial(_documents, chosen)
    return Corpus(f"text:{path}", identity, parts, "text", "causal-lm", derived=derived)


def _pieces(path: Path) -> Iterator[str]:
    """A file in pieces that end at a line's end."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rest = ""
            while block := file.read(PIECE):
                head, line, tail = (rest + block).rpartition("\n")
                if line:
                    yield head + line
                rest = tail
            if rest:
                yield rest
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}", "convert it, or take it out") from None


def _documents(files: list[Path]) -> Iterator[Row]:
    for path in files:
        last = None
        for piece in _pieces(path):
            if last is not None:
                yield Row(text=last, ends=False, place=str(path))
            last = piece
        if last is not None:
            yield Row(text=last, place=str(path))


def _lines_of(files: list[Path], part: str, shares: dict[str, float]) -> Iterator[Row]:
    """One part of each of a few files: test is their end, valid what is before it."""
    for path in files:
        size, seen = path.stat().st_size, 0
        test, valid = size * (1 - shares["test"]), size * (1 - shares["test"] - shares["valid"])
        held: list[str] = []
        for piece in _pieces(path):
            for line in piece.splitlines(keepends=True):
                if part == ("test" if seen >= test else "valid" if seen >= valid else "train"):
                    held.append(line)
                seen += len(line.encode())
            if sum(map(len, held)) > PIECE:
                yield Row(text="".join(held), ends=False, place=str(path))
                held = []
        yield Row(text="".join(held), place=str(path))


# ---- files of records ----


def _jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is no JSON: {error}", "mend or remove the line") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}, is a {type(record).__name__}", 'each line is an object such as {"text": "..."}')
            yield record, f"{path}, line {number}"


def _csv(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                place = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise UserError(f"{place}, has another number of columns than the first line", "mend or remove the line")
                yield record, place
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable CSV file: {error}", "save it as UTF-8 with quoted texts") from None


def _parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("pyarrow is not installed", "`pip install 'limbeck[hf]'`") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    yield record, f"{path}, row {number}"
                    number += 1
    except (OSError, pyarrow.ArrowException, *MISFITS) as error:
        raise UserError(f"{path} is no readable parquet file: {error}", "check the file") from None


_FILES: dict[str, Callable[[Path], Iterator[tuple[dict[str, Any], str]]]] = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}


def read_records(
    kind: str,
    path: str,
    shares: dict[str, float],
    seed: int = 0,
    columns: dict[str, str] | None = None,
    chat: bool = False,
    label: str | None = None,
    task: str = "auto",
) -> Corpus:
    """One file of records (`jsonl`, `csv`, `parquet`), from which rows are drawn, or a folder with train, test and perhaps valid files.

    Args:
        kind: which.
        path: the file or folder.
        shares, seed: of the draw.
        columns, chat, label: see `limbeck.data.text.columns.reading`.
        task: what the rows are for; "auto" tells by the columns.

    Raises:
        UserError: a missing or broken file (with the line), or missing columns.
    """
    folder = user_path(path)
    if folder.is_dir():
        named = {part: folder / f"{part}.{kind}" for part in ("train", "test", "valid")}
        if not named["train"].is_file() or not named["test"].is_file():
            raise UserError(f"{folder} has no train.{kind} and test.{kind}", "name one file, or a folder with both")
        files = {part: file for part, file in named.items() if file.is_file()}
    else:
        files = {"all": _file(path, kind)}
    identity = [kind, {part: file_identity(file) for part, file in files.items()}]
    reads: dict[str, Records] = {part: partial(_FILES[kind], file) for part, file in files.items()}
    return records_corpus(f"{kind}:{path}", identity, reads, shares, seed, columns, chat, label, task)


def records_corpus(
    name: str,
    identity: Any,
    reads: Mapping[str, Records],
    shares: dict[str, float],
    seed: int,
    columns: dict[str, str] | None,
    chat: bool,
    label: str | None,
    task: str,
) -> Corpus:
    """A corpus of records by part; one part called "all" is divided, each row by a number drawn from seed and place."""
    first = next(iter(next(iter(reads.values()))()), None)
    if first is None:
        raise UserError(f"{name} has no row", "give a file with rows")
    how = reading(name, list(first[0]), columns, chat, label, task)
    classes = _classes(reads, how) if how.shape == "labelled" else ()
    derived = set(reads) == {"all"}

    def rows(part: str) -> Iterator[Row]:
        for number, (record, place) in enumerate(reads["all" if derived else part]()):
            if not derived or part_of(seed, str(number), shares) == part:
                yield to_row(record, place, how, classes)

    wanted = [p for p in ("train", "test", "valid") if p == "train" or shares[p]] if derived else list(reads)
    mark = [identity, how.mark(), classes, [shares, seed] if derived else None]
    return Corpus(name, mark, {part: partial(rows, part) for part in wanted}, how.shape, how.kind, classes=classes, derived=derived)


def _classes(reads: Mapping[str, Records], how: Reading) -> tuple[str, ...]:
    """The names of the classes, in alphabetical order, numbers in theirs."""
    found: set[str] = set()
    for read in reads.values():
        for record, place in read():
            if record.get(how.columns["label"]) is None:
                raise UserError(f"{place} has no {how.columns['label']}", "fill it, or remove the row")
            found.add(str(record[how.columns["label"]]))
    return tuple(sorted(found, key=lambda c: (0, int(c), c) if c.lstrip("-").isdigit() else (1, 0, c)))


def read_jsonl(
    path: str, shares: dict[str, float], seed: int = 0, columns: dict[str, str] | None = None, chat: bool = False,
    label: str | None = None, kind: str = "auto",
) -> Corpus:  # fmt: skip
    """A file with one JSON object a line; see `read_records`."""
    return read_records("jsonl", path, shares, seed, columns, chat, label, kind)


def read_csv(
    path: str, shares: dict[str, float], seed: int = 0, columns: dict[str, str] | None = None, label: str | None = None, kind: str = "auto"
) -> Corpus:
    """A CSV file whose first line names the columns; see `read_records`."""
    return read_records("csv", path, shares, seed, columns, False, label, kind)


def read_parquet(
    path: str, shares: dict[str, float], seed: int = 0, columns: dict[str, str] | None = None, chat: bool = False,
    label: str | None = None, kind: str = "auto",
) -> Corpus:  # fmt: skip
    """A parquet file; see `read_records`."""
    return read_records("parquet", path, shares, seed, columns, chat, label, kind)
