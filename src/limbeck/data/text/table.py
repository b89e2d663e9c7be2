"""Ragged columns on disk: written piece by piece, resumed after a kill without a lost or doubled row, checked when opened.

A folder holds two files a column (`<name>.flat`, `<name>.ends`) and `manifest.jsonl`. A line of the manifest stands for one piece: the rows
so far, and for every file its size and the SHA-256 of what the piece added. A piece is written and synced before its line, so whatever lies
behind the last whole line is cut off when writing goes on. The last line says that the table is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from limbeck import storage
from limbeck.data.text.ragged import Ragged
from limbeck.errors import UserError

CHECKED = 2 << 30
"""Bytes up to which a table is checked whole when it is opened; of a larger one the sizes and that much of its pieces, evenly spread."""

Columns = Mapping[str, str]
"""Type of each column by name, such as "uint16"."""


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a manifest; a torn last line is left out."""
    try:
        content = (folder / "manifest.jsonl").read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in content.splitlines():
        try:
            mark, _, body = line.partition(" ")
            if storage.sha256(body.encode())[:16] != mark:
                break
            lines.append(json.loads(body))
        except (ValueError, RecursionError):
            break
    return lines


def _append(folder: Path, value: dict[str, Any]) -> None:
    body = json.dumps(value, sort_keys=True)
    with (folder / "manifest.jsonl").open("a") as file:
        file.write(f"{storage.sha256(body.encode())[:16]} {body}\n")
        file.flush()
        os.fsync(file.fileno())


def _files(columns: Columns) -> list[str]:
    return [f"{name}.{half}" for name in columns for half in ("flat", "ends")]


def _repair(folder: Path, columns: Columns) -> list[dict[str, Any]]:
    """Cut everything behind the last whole line; the lines that stay."""
    lines = _lines(folder)
    for name in _files(columns):
        wanted = lines[-1]["files"][name][0] if lines else 0
        path = folder / name
        path.touch()
        if path.stat().st_size < wanted:
            return _restart(folder, columns)
        os.truncate(path, wanted)
    _rewrite(folder, lines)
    return lines


def _restart(folder: Path, columns: Columns) -> list[dict[str, Any]]:
    for name in [*_files(columns), "manifest.jsonl"]:
        (folder / name).unlink(missing_ok=True)
        (folder / name).touch()
    return []


def _rewrite(folder: Path, lines: list[dict[str, Any]]) -> None:
    bodies = [json.dumps(line, sort_keys=True) for line in lines]
    storage.write_text(folder / "manifest.jsonl", "".join(f"{storage.sha256(b.encode())[:16]} {b}\n" for b in bodies))


def write_table(
    folder: Path, columns: Columns, pieces: Callable[[int], Iterable[tuple[int, Mapping[str, list[np.ndarray]]]]], note: Any = None
) -> Table:
    """The table in `folder`: opened where it is complete, gone on with where it is not.

    Args:
        folder: of this table alone; two processes that write it at the same time wait for each other.
        columns: name and type of each column.
        pieces: `pieces(n)` gives what comes after the first n rows of the source, as (rows of the source read, arrays by column); it must
            give the same pieces at the same places each time, except that the first may begin anywhere.
        note: JSON that is kept with the table.

    Raises:
        UserError: a complete table whose files are torn or altered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = _lines(folder)
        if not (lines and lines[-1].get("done")):
            lines = _repair(folder, columns)
            _write(folder, columns, pieces, lines, note)
    return Table(folder)


def _write(folder: Path, columns: Columns, pieces: Any, lines: list[dict[str, Any]], note: Any) -> None:
    read, rows = (lines[-1]["read"], lines[-1]["rows"]) if lines else (0, 0)
    sizes = {name: (folder / name).stat().st_size for name in _files(columns)}
    last = {name: sizes[f"{name}.flat"] // np.dtype(kind).itemsize for name, kind in columns.items()}
    for seen, arrays in pieces(read):
        read += seen
        rows += len(next(iter(arrays.values())))
        files = {}
        for name, kind in columns.items():
            lengths = np.cumsum([len(a) for a in arrays[name]], dtype=np.int64) + last[name]
            last[name] = int(lengths[-1]) if len(lengths) else last[name]
            flat = np.concatenate(arrays[name]).astype(kind) if len(lengths) else np.zeros(0, kind)
            for half, content in (("flat", flat.tobytes()), ("ends", lengths.tobytes())):
                path = folder / f"{name}.{half}"
                with path.open("ab") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                sizes[path.name] += len(content)
                files[path.name] = [sizes[path.name], storage.sha256(content)]
        _append(folder, {"read": read, "rows": rows, "files": files})
    _append(folder, {"done": True, "read": read, "rows": rows, "columns": dict(columns), "sizes": sizes, "note": note})


class Table:
    """A complete table, mapped from disk.

    Args:
        folder: that `write_table` filled.

    Attributes:
        rows: how many.
        note: what was kept with it.
        digest: of the content of all columns.

    Raises:
        UserError: the files are torn or altered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, lines = folder, _lines(folder)
        if not lines or not lines[-1].get("done"):
            raise UserError(f"{folder} holds no complete token file", f"remove the folder {folder}; it is written anew")
        *pieces, end = lines
        self.rows, self.note, self._columns = int(end["rows"]), end["note"], dict(end["columns"])
        for name, size in end["sizes"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if found != size:
                raise self._torn(name, f"{max(found, 0)} bytes where {size} were written")
        self._check(pieces, sum(end["sizes"].values()))
        self.digest = storage.fingerprint(
            [
                [name, kind, [p["files"][f"{name}.flat"][1] for p in pieces], [p["files"][f"{name}.ends"][1] for p in pieces]]
                for name, kind in self._columns.items()
            ]
        )

    def _torn(self, name: str, why: str) -> UserError:
        return UserError(f"the token file {self.folder / name} is torn or was altered: {why}", f"remove {self.folder}; it is written anew")

    def _check(self, pieces: list[dict[str, Any]], total: int) -> None:
        stride = max(1, -(-total // CHECKED))
        for name in _files(self._columns):
            with (self.folder / name).open("rb") as file:
                start = 0
                for number, piece in enumerate(pieces):
                    size, mark = piece["files"][name]
                    if number % stride == 0:
                        file.seek(start)
                        if storage.sha256(file.read(size - start)) != mark:
                            raise self._torn(name, f"piece {number} has another checksum")
                    start = size

    def __len__(self) -> int:
        return self.rows

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Ragged:
        return Ragged(self._map(f"{name}.flat", self._columns[name]), self._map(f"{name}.ends", "int64"))

    def _map(self, name: str, kind: str) -> np.ndarray:
        if (self.folder / name).stat().st_size == 0:
            return np.zeros(0, kind)
        return np.memmap(self.folder / name, dtype=kind, mode="r")


def grouped(rows: Iterable[Any], size: Callable[[Any], int], most_rows: int = 512, most: int = 1 << 20) -> Iterator[list[Any]]:
    """Rows in lists of at most `most_rows` that together are not much larger than `most`."""
    group: list[Any] = []
    total = 0
    for row in rows:
        group.append(row)
        total += size(row)
        if len(group) >= most_rows or total >= most:
            yield group
            group, total = [], 0
    if group:
        yield group
