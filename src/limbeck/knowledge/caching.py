"""Storing a teacher's outputs once, so that many students can be trained from them without running it again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from limbeck import recipe as schema
from limbeck.engine.callbacks import Callback
from limbeck.engine.session import Session
from limbeck.errors import UserError, unwritable
from limbeck.knowledge.labelling import Labelling, labelling
from limbeck.scaling.sizing import Sizing
from limbeck.signals import manifest
from limbeck.signals.store import StoreWriter, plan_bytes
from limbeck.signals.stored_form import Form, Layout

SHARDS = 1000
"""At most about so many files a store; one holds at least 1024 samples or 16384 tokens."""


@dataclass
class Written:
    """What a store is: its folder, rows, the shapes and form of what it holds, bytes, whether it was complete already, what a row is."""

    folder: Path
    samples: int
    signals: dict[str, tuple[int, ...]]
    form: str
    bytes_per_sample: int
    bytes: int
    found: bool
    rows: str = "samples"


def _ours(path: Path) -> bool:
    """The lock, or a manifest whose first writer was killed."""
    return path.name == ".lock" or (path.name.startswith(f".{manifest.FILE}.") and path.suffix == ".tmp")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "name a folder with --out")
    if folder.is_dir() and not (folder / manifest.FILE).is_file() and any(not _ours(item) for item in folder.iterdir()):
        raise UserError(f"the folder {folder} is not empty and holds no stored outputs", "name an empty or new folder with --out")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a folder that is made for it and stays empty is removed again.

    Raises:
        UserError: another command has it, or the folder cannot be written (unless it holds a finished store: then nothing is written).
    """
    from filelock import FileLock, Timeout

    fresh, lock = not folder.exists(), FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another command writes in {folder}", "wait for it, or name another folder with --out") from None
    except OSError as error:
        if (folder / manifest.FILE).is_file() and manifest.Manifest.read(folder).finished:
            yield
            return
        raise unwritable(f"the folder {folder}", error, "choose one that you can write to") from None
    try:
        yield
    finally:
        lock.release()
        if fresh and not any(item.name != ".lock" for item in folder.iterdir()):
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def store_teacher(
    recipe: schema.Recipe,
    folder: Path,
    session: Session,
    *,
    form: Form = "float16",
    k: int | None = None,
    signals: Sequence[str] = (),
    shard_rows: int | None = None,
    sizing: Sizing = Sizing(),  # noqa: B008 (frozen)
    callbacks: Sequence[Callback] = (),
    announce: Callable[[Written], None] = lambda planned: None,
    say: Callable[[str], None] = lambda line: None,
) -> Written:
    """Write what the recipe's teacher says about every training sample; goes on where an interrupted call stopped.

    Every engine writes the same bytes, and goes on with what another one began.

    Args:
        recipe: says which teacher and data.
        folder: where to; a new or empty one, or one begun by the same call.
        session: device, and who is told while a teacher has to be trained first.
        form, k: see `limbeck.signals.store_writer.StoreWriter`.
        signals: what to store; by default what the recipe's method reads.
        shard_rows: rows a file; by default 1024 samples or 16384 tokens, and more where that would make over `SHARDS` files.
        sizing: who computes.
        callbacks: told about progress, as the phase "cache".
        announce: told what the store will be, with the most bytes that it can take, before anything is written.
        say: told who works, when others than this process do.

    Raises:
        UserError: anything that the user can mend, such as a folder that was written for another teacher or other data.
    """
    _check_folder(folder)
    labels = labelling(recipe, session, signals, k if form == "topk" else None)
    layout = Layout(labels.shapes, form, k)
    shard = shard_rows or max(1024 if labels.unit == "samples" else 16384, -(-labels.rows // SHARDS))
    total = plan_bytes(labels.rows, labels.shapes, form, k, shard_size=shard)
    announce(Written(folder, labels.rows, labels.shapes, form, layout.bytes_per_sample, total, False, labels.unit))
    with _alone(folder):
        writer = StoreWriter(
            folder,
            teacher_fingerprint=labels.teacher_fingerprint,
            data_fingerprint=labels.data_fingerprint,
            samples=labels.rows,
            signals=labels.shapes,
            form=form,
            k=k,
            shard_size=shard,
        )
        found = writer.finished
        if not found:
            told = _Told(callbacks, writer)
            if sizing.engine == "ray":
                from limbeck.knowledge.caching_ray import fill

                fill(writer, labels, recipe, sizing, told, say)
            else:
                _fill(writer, labels, told)
            writer.finish()
            told.finish()
    on_disk = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    return Written(folder, labels.rows, labels.shapes, form, layout.bytes_per_sample, on_disk, found, labels.unit)


class _Told:
    """Tells callbacks how far a store is."""

    def __init__(self, callbacks: Sequence[Callback], writer: StoreWriter) -> None:
        self.callbacks, self.began, self.first = callbacks, time.perf_counter(), writer.stored
        for callback in callbacks:
            callback.start("cache", self.first, writer.total)

    def __call__(self, done: int) -> None:
        """So many rows are done."""
        rate = (done - self.first) / max(time.perf_counter() - self.began, 1e-9)
        for callback in self.callbacks:
            callback.log({"phase": "cache", "step": done, "terms": {}, "rate": rate})
            callback.tick(done)

    def finish(self) -> None:
        """All are."""
        for callback in self.callbacks:
            callback.finish("cache")


def runs_of(numbers: Sequence[int]) -> list[range]:
    """Increasing numbers as runs without a gap, in order."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def _fill(writer: StoreWriter, labels: Labelling, told: Callable[[int], None]) -> None:
    """Label what is missing in this process."""
    done = writer.stored
    for run in runs_of(writer.missing()):
        for index, said in labels.pieces(run.start * writer.shard_size, min(run.stop * writer.shard_size, writer.total)):
            writer.write(index, said)
            done += len(index)
            told(done)
