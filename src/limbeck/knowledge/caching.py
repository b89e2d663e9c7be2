"""Storing a teacher's outputs once, so that many students can be trained from them without running it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import recipe as schema
from limbeck.data import Data
from limbeck.engine.callbacks import Callback
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.teachers import EnsembleTeacher, FrozenTeacher, Teacher
from limbeck.signals import Signals
from limbeck.signals.store import StoreWriter, plan_bytes
from limbeck.signals.stored_form import Form, Layout

SHARDS = 1000
"""At most about so many files a store; one holds at least 1024 samples."""


@dataclass
class Written:
    """What a store is: its folder, samples, the shapes and form of what it holds, bytes, and whether it was complete already."""

    folder: Path
    samples: int
    signals: dict[str, tuple[int, ...]]
    form: str
    bytes_per_sample: int
    bytes: int
    found: bool


def _teacher(recipe: schema.Recipe, networks: Mapping[str, nn.Module], wants: tuple[str, ...]) -> Teacher:
    if not networks:
        raise UserError("the recipe names no teacher, so there is nothing to store", "set `teacher`, for example --set teacher=cnn")
    if len(networks) == 1:
        return FrozenTeacher(next(iter(networks.values())), wants)
    if wants != ("logits",):
        raise UserError(
            f"of several teachers only the logits of all together can be stored, not {', '.join(wants)}",
            "add --signals logits, or name one teacher",
        )
    return EnsembleTeacher({name: FrozenTeacher(network) for name, network in networks.items()}, recipe.teacher.weights)


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
    data = models.open_recipe_data(recipe.data)
    networks = models.teacher_networks(recipe, data, session, {})
    teacher = _teacher(recipe, networks, wants)
    size = min(recipe.training.batch, len(data.train))
    on_device = data.to(session.device)
    shapes = {name: tuple(value.shape[1:]) for name, value in flat(teacher(on_device.example(2).to(session.device)), wants).items()}
    layout = Layout(shapes, form, k)
    shard = max(1024, -(-len(data.train) // SHARDS))
    total = plan_bytes(len(data.train), shapes, form, k, shard_size=shard)
    announce(Written(folder, len(data.train), shapes, form, layout.bytes_per_sample, total, False))

    from filelock import FileLock, Timeout

    writer = StoreWriter(
        folder,
        teacher_fingerprint=models.teacher_fingerprint(networks, recipe.teacher.weights) or "",
        data_fingerprint=data.fingerprint,
        samples=len(data.train),
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
            _write(writer, teacher, on_device, size, wants, session.device, callbacks)
        finally:
            lock.release()
    on_disk = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    return Written(folder, len(data.train), shapes, form, layout.bytes_per_sample, on_disk, found)


def _write(
    writer: StoreWriter,
    teacher: Teacher,
    data: Data,
    size: int,
    wants: tuple[str, ...],
    device: torch.device,
    callbacks: Sequence[Callback],
) -> None:
    import time

    total, began, first = writer.total, time.perf_counter(), writer.next_index
    for callback in callbacks:
        callback.start("cache", first, total)
    start = first // size * size
    while writer.next_index < total:
        index = torch.arange(min(start, total - size), min(start + size, total))
        # rows that are stored already are computed again and left out by the writer
        said: Any = teacher(data.train.batch(index).to(device))
        writer.write(index, flat(said, wants))
        start += size
        done = writer.next_index
        record = {"phase": "cache", "step": done, "terms": {}, "rate": (done - first) / max(time.perf_counter() - began, 1e-9)}
        for callback in callbacks:
            callback.log(record)
            callback.tick(done)
    writer.finish()
    for callback in callbacks:
        callback.finish("cache")
