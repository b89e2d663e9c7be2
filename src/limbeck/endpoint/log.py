"""The log of answers: one JSON line each, with a checksum, on the disk before it counts."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.errors import UserError, unwritable
from limbeck.storage import sha256

_CHECK = "sha256"
FIELDS = ("key", "id", "model", "text", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs", "seconds")
"""What a record holds; the checksum comes after them."""


def _line(record: dict[str, Any]) -> bytes:
    """The one way a record is written: keys in their order, ASCII, the checksum of the rest last."""
    content = json.dumps(record, allow_nan=False, separators=(",", ":"))
    return json.dumps({**record, _CHECK: sha256(content.encode())}, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _read_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line with its newline, or None when a single byte is not as it was written."""
    try:
        record = json.loads(line)
        record.pop(_CHECK)
        whole = tuple(record) == FIELDS and _line(record) == line
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if whole else None


def _unwritable(path: Path, error: OSError) -> UserError:
    return unwritable(f"the log {path}", error, "choose a place that you can write to")


class ResponseLog:
    """Answers by key, in a file of JSON lines that only grows.

    Each record is appended with one write and synced before `append` returns, so a kill loses at most the line under way: a last
    line without its newline is left out (`note` says so) and cut off by the next writer. A line that is not byte for byte what was
    written is an error that names file and line. Of two records with one key the first holds. The answers lie in memory too.

    Args:
        path: the file; made by the first writer. A lock file with `.lock` at the end of the name lies beside it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.note: str | None = None
        self._answers: dict[str, dict[str, Any]] = {}
        self._lines = self._end = 0  # what has been read, in lines and in bytes
        self._last = b""  # the last line read: a file in which it is no more is another file
        self._guard = threading.Lock()
        self._file: int | None = None

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, None when there is none."""
        return self._answers.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, in the order in which they were written."""
        yield from list(self._answers.values())

    def read(self) -> None:
        """Read what has been written since the last time, by whomever.

        Raises:
            UserError: an altered line (file and line are named), or a file that cannot be read.
        """
        with self._guard:
            self._read()

    def _read(self) -> bytes:
        """As `read`; returns the torn end."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._end - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._forget()
                    file.seek(0)
                content = file.read()
        except FileNotFoundError:
            self._forget()
            return b""
        except OSError as error:
            raise UserError(f"the log {self.path} cannot be read: {error.strerror}", "check the path and its permissions") from None
        *lines, torn = content.split(b"\n")
        for line in lines:
            record = _read_line(line + b"\n")
            if record is None:
                raise UserError(
                    f"{self.path}, line {self._lines + 1} is not an answer as it was written: its checksum does not fit",
                    "restore the file, or delete that line: its question is then asked again",
                )
            self._answers.setdefault(record["key"], record)
            self._passed(line + b"\n")
        return torn

    def _forget(self) -> None:
        self._answers, self._lines, self._end, self._last = {}, 0, 0, b""

    def _passed(self, line: bytes) -> None:
        self._lines, self._end, self._last = self._lines + 1, self._end + len(line), line

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the file for writing: lock it against other writers, read it, cut off a torn end.

        Raises:
            UserError: another writer has it, or it cannot be written, or `read` raises.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.path}.lock", thread_local=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another run is writing the log {self.path}", "wait for it to end, or give another log file") from None
        except OSError as error:
            raise _unwritable(self.path, error) from None
        try:
            self._open()
            yield
        finally:
            with self._guard:
                file, self._file = self._file, None
            if file is not None:
                os.close(file)
            lock.release()

    def _open(self) -> None:
        with self._guard:
            torn = self._read()
            try:
                new = not self.path.exists()
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                if torn:
                    self.note = f"{self.path}: the last line was torn (a run was stopped in the middle of writing it) and has been left out"
                    os.ftruncate(self._file, self._end)
                    os.fsync(self._file)
                if new:
                    folder = os.open(self.path.parent, os.O_RDONLY)
                    os.fsync(folder)
                    os.close(folder)
            except OSError as error:
                raise _unwritable(self.path, error) from None

    def append(self, record: dict[str, Any]) -> bool:
        """Keep a record (of `FIELDS`), safely on the disk on return. Any thread may call it inside `writing`.

        Returns:
            False, and nothing is written, when `writing` has ended.

        Raises:
            UserError: the disk refuses.
        """
        line = _line(record)
        with self._guard:
            if self._file is None:
                return False
            try:
                done = 0
                while done < len(line):
                    done += os.write(self._file, line[done:])
                os.fsync(self._file)
            except OSError as error:
                # half a line must not stay before the next one
                os.ftruncate(self._file, self._end)
                raise _unwritable(self.path, error) from None
            self._answers.setdefault(record["key"], _read_line(line) or record)
            self._passed(line)
        return True
