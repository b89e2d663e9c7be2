"""Storing a teacher's outputs once, so that many students can be trained from them without running it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck import recipe as schema
from limbeck.data import Data
from limbeck.engine.callbacks import Callback
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.teachers import EnsembleTeacher, FrozenTeacher, Teacher, scored_counts
from limbeck.knowledge.tokens import check_tokens
from limbeck.losses.vocabulary import top_k
from limbeck.signals import Signals
from limbeck.signals.store import StoreWriter, plan_bytes
from limbeck.signals.stored_form import INDICES, REST, VALUES, Form, Layout
from limbeck.tasks import Task

SHARDS = 1000
"""At most about so many files a store; one holds at least 1024 samples."""


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


def _teacher(recipe: schema.Recipe, networks: Mapping[str, nn.Module], wants: tuple[str, ...], task: Task) -> Teacher:
    if not networks:
        raise UserError("the recipe names no teacher, so there is nothing to store", "set `teacher`, for example --set teacher=cnn")
    if len(networks) == 1:
        return FrozenTeacher(next(iter(networks.values())), wants, read=task.reader)
    if wants not in (("logits",), ("law",)):
        raise UserError(
            f"of several teachers only the logits of all together can be stored, not {', '.join(wants)}",
            "add --signals logits, or name one teacher",
        )
    return EnsembleTeacher({name: FrozenTeacher(network, read=task.reader) for name, network in networks.items()}, recipe.teacher.weights)


def check(recipe: schema.Recipe, wants: Sequence[str]) -> None:
    """Refuse what cannot be stored, before anything is trained or loaded.

    Raises:
        UserError: augmented inputs, a teacher that changes while the student learns, or signals that a store cannot hold.
    """
    if recipe.data.augment:
        raise UserError(
            f"data.augment ({', '.join(recipe.data.augment)}) changes the inputs in every epoch; a store holds one answer a sample",
            "leave it away: --set data.augment=[]",
        )
    if recipe.teacher.kind in ("online", "ema", "history"):
        raise UserError(
            f"a teacher of the kind {recipe.teacher.kind} changes while the student learns", "store a frozen one: --set teacher.kind=frozen"
        )
    if not wants:
        raise UserError("no signal is named", "for example --signals logits,embedding")
    for name in wants:
        if name in ("attention", "output"):
            raise UserError(f"{name} cannot be stored", "choose of logits, embedding, stages and module paths (see `limbeck inspect`)")


def wanted(recipe: schema.Recipe) -> tuple[str, ...]:
    """The teacher's signals that the recipe's method reads; the logits when it reads none."""
    return models.make_method(recipe.method).wants()[1] or ("logits",)


def flat(said: Signals, wants: Sequence[str]) -> dict[str, Tensor]:
    """Signals as the store names them: "stages" becomes "stages[0]", "stages[1]", ..."""
    found: dict[str, Tensor] = {}
    for name in wants:
        if name == "stages":
            found |= {f"stages[{number}]": value for number, value in enumerate(said.stages)}
        elif name.startswith("stages["):
            found[name] = said.stages[int(name[7:-1])]
        else:
            found[name] = getattr(said, name) if name in said else said.at[name.removeprefix("at:")]
    return found


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "name a folder with --out")
    if folder.is_dir() and not (folder / "manifest.json").is_file() and any(item.name != ".lock" for item in folder.iterdir()):
        raise UserError(f"the folder {folder} is not empty and holds no stored outputs", "name an empty or new folder with --out")


def store_teacher(
    recipe: schema.Recipe,
    folder: Path,
    session: Session,
    *,
    form: Form = "float16",
    k: int | None = None,
    signals: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    announce: Callable[[Written], None] = lambda planned: None,
) -> Written:
    """Write what the recipe's teacher says about every training sample; goes on where an interrupted call stopped.

    Batches have the size that training uses and start at multiples of it, so that each row is computed as a live teacher would
    compute it, and a resumed store is the same byte for byte.

    Args:
        recipe: says which teacher and data.
        folder: where to; a new or empty one, or one begun by the same call.
        session: device, and who is told while a teacher has to be trained first.
        form, k: see `limbeck.signals.store.StoreWriter`.
        signals: what to store; by default what the recipe's method reads.
        callbacks: told about progress, as the phase "cache".
        announce: told what the store will be, with the most bytes that it can take, before anything is written.

    Raises:
        UserError: anything that the user can mend, such as a folder that was written for another teacher or other data.
    """
    wants = tuple(dict.fromkeys(signals)) or wanted(recipe)
    check(recipe, wants)
    _check_folder(folder)
    data = models.open_recipe_data(recipe.data, None, recipe)
    networks = models.teacher_networks(recipe, data, session, {})
    check_tokens(networks, data)
    task = models.task_of(recipe, data)
    if task.family == "language" and wants not in (("logits",), ("law",)):
        raise UserError(f"of a language model only next-token distributions can be stored, not {', '.join(wants)}", "add --signals logits")
    teacher = _teacher(recipe, networks, wants, task)
    size = min(recipe.training.batch, len(data.train))
    on_device = data.to(session.device)
    if task.family == "language":
        shapes = {"logits": (task.text.vocabulary,)}
        counts = scored_counts(data.train, task)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        unit, rows, pieces = "tokens", int(starts[-1]), partial(_tokens, starts=starts, k=k if form == "topk" else None)
    elif task.family == "classification":
        shapes = {name: tuple(value.shape[1:]) for name, value in flat(teacher(on_device.example(2).to(session.device)), wants).items()}
        unit, rows, pieces = "samples", len(data.train), partial(_samples, wants=wants)
    else:
        raise UserError(f"outputs of a teacher of {task.kind} cannot be stored", "use the teacher itself")
    layout = Layout(shapes, form, k)
    shard = max(1024 if rows == len(data.train) else 16384, -(-rows // SHARDS))
    total = plan_bytes(rows, shapes, form, k, shard_size=shard)
    announce(Written(folder, rows, shapes, form, layout.bytes_per_sample, total, False, unit))

    from filelock import FileLock, Timeout

    writer = StoreWriter(
        folder,
        teacher_fingerprint=models.teacher_fingerprint(networks, recipe.teacher.weights) or "",
        data_fingerprint=data.fingerprint,
        samples=rows,
        signals=shapes,
        form=form,
        k=k,
        shard_size=shard,
    )
    found = writer.finished
    if not found:
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another command writes in {folder}", "wait for it, or name another folder with --out") from None
        try:
            _write(writer, pieces(writer, teacher, on_device, size, session.device), callbacks)
        finally:
            lock.release()
    on_disk = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    return Written(folder, rows, shapes, form, layout.bytes_per_sample, on_disk, found, unit)


Piece = tuple[Tensor, dict[str, Tensor]]
"""Row numbers, and what the teacher says of them."""


def _tokens(
    writer: StoreWriter, teacher: Teacher, data: Data, size: int, device: torch.device, starts: Tensor, k: int | None
) -> Iterator[Piece]:
    """One row for each scored token, in the order of the samples; logits of the whole vocabulary exist a chunk at a time."""
    sample = int(torch.searchsorted(starts, torch.tensor(writer.next_index), right=True)) - 1
    for first in range(min(sample, len(data.train) - 1) // size * size, len(data.train), size):
        end = min(first + size, len(data.train))
        law = teacher(data.train.batch(torch.arange(first, end)).to(device)).law
        if k is None:
            logits = law.logits()
            said = {"logits": logits - logits.logsumexp(-1, keepdim=True)}
        else:
            top = top_k(law, k)
            rest = (-torch.expm1(top.logs.float().logsumexp(-1))).clamp_min(0)
            said = {VALUES: top.logs, INDICES: top.ids, REST: rest}
        yield torch.arange(int(starts[first]), int(starts[end])), said


def _samples(
    writer: StoreWriter, teacher: Teacher, data: Data, size: int, device: torch.device, wants: tuple[str, ...]
) -> Iterator[Piece]:
    """One row for each sample. Rows that are stored already are computed again and left out by the writer."""
    total = writer.total
    for start in range(writer.next_index // size * size, total, size):
        index = torch.arange(min(start, total - size), min(start + size, total))
        yield index, flat(teacher(data.train.batch(index).to(device)), wants)


def _write(writer: StoreWriter, pieces: Iterator[Piece], callbacks: Sequence[Callback]) -> None:
    import time

    total, began, first = writer.total, time.perf_counter(), writer.next_index
    for callback in callbacks:
        callback.start("cache", first, total)
    for index, said in pieces:
        writer.write(index, said)
        done = writer.next_index
        record = {"phase": "cache", "step": done, "terms": {}, "rate": (done - first) / max(time.perf_counter() - began, 1e-9)}
        for callback in callbacks:
            callback.log(record)
            callback.tick(done)
    writer.finish()
    for callback in callbacks:
        callback.finish("cache")
