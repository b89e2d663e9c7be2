"""Writing a teacher's outputs: sharded safetensors, sized before they are written, resumable, checksummed, bound to teacher and data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import UserError, unwritable
from limbeck.signals.manifest import FILE, VERSION, Manifest, Shard, shard_file
from limbeck.signals.stored_form import Form, Layout, plan_bytes
from limbeck.storage import save_tensors, sha256, sync_folder

NAMES = {"teacher": "teacher fingerprint", "data": "data fingerprint"}
"""How messages name the keys of a manifest that a store is bound to."""


class StoreWriter:
    """Writes a teacher's outputs once, to be read many times by `limbeck.signals.store.Store`.

    Rows are numbered: view v of sample i is row `i + v * samples` (`key` computes it). A shard is `shard_size` rows. Each is written
    atomically, then the manifest with its SHA-256; after a kill a new writer with the same arguments keeps every shard that is whole
    and asks for the others (`missing`), and the finished files are the same byte for byte. There are two ways to fill it: `write` takes
    rows in order, `commit` takes a shard that somebody else has written beside it; they may be mixed.

    One writer a folder: whoever makes one holds a lock (`limbeck.knowledge.caching` does).

    Args:
        folder: where to write; made when absent.
        teacher_fingerprint: `model_fingerprint` of the teacher.
        data_fingerprint: digest of the data and their order.
        samples: number of samples, N.
        signals: name to shape of one sample's signal, for example `{"logits": (10,), "embedding": (64,)}`.
        form: "float16", "float32" or "topk" (logits only; see `Layout`).
        k: kept logits of the form "topk".
        shard_size: rows a file.
        preprocessing: how inputs were made (text or JSON value); a changed one is refused when going on.
        views: stored augmentations a sample.

    Raises:
        UserError: not enough room on the disk, a folder that cannot be written, or one begun with other arguments (both named).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher_fingerprint: str,
        data_fingerprint: str,
        samples: int,
        signals: Mapping[str, tuple[int, ...]],
        form: Form = "float16",
        k: int | None = None,
        shard_size: int = 1024,
        preprocessing: Any = "",
        views: int = 1,
    ) -> None:
        if samples < 1 or views < 1 or shard_size < 1:
            raise UserError(f"samples={samples}, views={views}, shard_size={shard_size}: each must be at least 1", "raise it to 1 or more")
        self.folder = Path(folder)
        self.layout = Layout(dict(signals), form, k)
        self.samples, self.views, self.total, self.shard_size = samples, views, samples * views, shard_size
        self._manifest = Manifest(
            format=VERSION,
            teacher=teacher_fingerprint,
            data=data_fingerprint,
            preprocessing=json.loads(json.dumps(preprocessing)),
            samples=samples,
            views=views,
            signals={name: list(shape) for name, shape in self.layout.signals.items()},
            form=form,
            k=k,
            shard_size=shard_size,
            finished=False,
            shards=[],
        )
        if (self.folder / FILE).is_file():
            self._go_on(Manifest.read(self.folder))
        self._have = {shard.first // shard_size for shard in self._manifest.shards}
        self._number = self._next_number(0)
        self._buffer: list[dict[str, Tensor]] = []
        self._buffered = 0
        if not self._manifest.finished:
            self._check_room()
            self._prepare_folder()

    def _go_on(self, found: Manifest) -> None:
        """Take over the shards of an earlier writer that are whole."""
        for name, value in self._manifest.model_dump().items():
            before = getattr(found, name)
            if name not in ("shards", "finished") and before != value:
                raise UserError(
                    f"{self.folder} was begun with another {NAMES.get(name, name)}: {before!r} there, {value!r} now",
                    "give the same arguments to go on, or another folder",
                )
        whole = [shard for shard in found.shards if (path := self.folder / shard.file).is_file() and sha256(path) == shard.sha256]
        self._manifest.shards = whole
        self._manifest.finished = found.finished and len(whole) == len(found.shards)

    def _check_room(self) -> None:
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        m = self._manifest
        need = plan_bytes(self.total - m.stored, self.layout.signals, m.form, m.k, 1, self.shard_size)
        free = shutil.disk_usage(place).free
        if need > free:
            raise UserError(
                f"storing the teacher needs {need / 1e9:.3g} GB in {self.folder}, and {free / 1e9:.3g} GB are free",
                "use another folder, form='topk' with a small k, or fewer signals",
            )

    def _prepare_folder(self) -> None:
        """Make the folder, remove what a killed writer left behind, and write the manifest."""
        known = {shard.file for shard in self._manifest.shards}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(".*.tmp")]:
                if path.name not in known:
                    path.unlink()
            self._manifest.write(self.folder)
        except OSError as error:
            raise unwritable(f"the folder {self.folder}", error, "choose one that you can write to") from None

    @property
    def shards(self) -> int:
        """How many shards the finished store has."""
        return -(-self.total // self.shard_size)

    @property
    def stored(self) -> int:
        """Rows of the shards that are safely on the disk."""
        return self._manifest.stored

    @property
    def next_index(self) -> int:
        """The first row that is neither stored nor taken by `write`; rows behind it may be stored already."""
        return min(self._number * self.shard_size + self._buffered, self.total)

    @property
    def finished(self) -> bool:
        """Whether the store is complete and can be opened."""
        return self._manifest.finished

    def manifest(self) -> Manifest:
        """A copy of what is written in the folder."""
        return self._manifest.model_copy(deep=True)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not stored, in order."""
        return [number for number in range(self.shards) if number not in self._have]

    def _next_number(self, number: int) -> int:
        while number in self._have:
            number += 1
        return number

    def key(self, index: Tensor, view: int = 0) -> Tensor:
        """Rows of view `view` of samples `index`: `index + view * samples`."""
        return index + view * self.samples

    def write(self, index: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Take the next rows.

        Args:
            index: `(B,)` int64 consecutive row numbers that reach `next_index`; rows that are stored already are left out.
            signals: name to `(B, ...)` values for each planned signal.

        Raises:
            UserError: rows out of order or beyond the end, other shapes, or values that the form cannot hold.
        """
        index = index.detach().cpu()
        if not len(index):
            return
        first, end = int(index[0]), int(index[-1]) + 1
        consecutive = torch.equal(index, torch.arange(first, first + len(index)))
        if not consecutive or first > self.next_index or end > self.total:
            raise UserError(
                f"rows {first} to {end - 1} cannot be stored now: the next is {self.next_index} of {self.total}, and rows come in order",
                "go through the data without shuffling, starting at writer.next_index",
            )
        if end <= (start := self.next_index):
            return
        packed = self.layout.pack({name: value[start - first :] for name, value in signals.items() if isinstance(value, Tensor)})
        if (rows := {len(value) for value in packed.values()}) != {end - start}:
            raise UserError(
                f"{len(index)} rows were announced and {max(rows) + start - first} given", "index and signals have one row a sample"
            )
        while (row := self.next_index) < end:
            shard, count = self._manifest.rows_of(self._number)
            stop = min(end, shard + count)
            self._buffer.append({name: value[row - start : stop - start].clone() for name, value in packed.items()})
            self._buffered += stop - row
            if self._buffered == count:
                self._flush()

    def _flush(self) -> None:
        number, file = self._number, shard_file(self._number)
        joined = {name: torch.cat([part[name] for part in self._buffer]) for name in self.layout.tensors()}
        self._add(number, save_tensors(self.folder / file, joined))

    def commit(self, number: int, digest: str, part: Path) -> None:
        """Take a shard that is written already, by moving its file to its place; one that is stored is not taken twice.

        Args:
            number: which shard.
            digest: the SHA-256 of its bytes.
            part: its file, in the store's folder and synced; gone afterwards.
        """
        if number in self._have:
            part.unlink(missing_ok=True)
            return
        os.replace(part, self.folder / shard_file(number))
        sync_folder(self.folder)
        self._add(number, digest)

    def _add(self, number: int, digest: str) -> None:
        if number == self._number:
            self._buffer, self._buffered = [], 0
        first, count = self._manifest.rows_of(number)
        self._manifest.shards.append(Shard(file=shard_file(number), first=first, count=count, sha256=digest))
        self._manifest.shards.sort(key=lambda shard: shard.first)
        self._have.add(number)
        self._number = self._next_number(self._number)
        self._manifest.write(self.folder)

    def finish(self) -> None:
        """Mark the store as complete.

        Raises:
            UserError: rows are missing.
        """
        if self.finished:
            return
        if self.next_index < self.total:
            have = self.stored + self._buffered
            raise UserError(f"the store is not complete: {have} of {self.total} rows", "write the others first")
        self._manifest.finished = True
        self._manifest.write(self.folder)
