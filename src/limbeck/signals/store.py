"""Stored teacher outputs: sharded safetensors, sized before they are written, resumable, checksummed, bound to teacher and data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.signals.signals import Signals
from limbeck.signals.stored_form import INDICES, REST, VALUES, Form, Layout, dense_logits, model_fingerprint, plan_bytes
from limbeck.storage import load_tensors, save_tensors, sha256, write_json

__all__ = ["Store", "StoreWriter", "dense_logits", "model_fingerprint", "plan_bytes"]

_MANIFEST = "manifest.json"
_VERSION = "limbeck-store/1"
_NAMES = {"teacher": "teacher fingerprint", "data": "data fingerprint"}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise UserError(f"no stored teacher outputs in {folder}: no {_MANIFEST}", "check the path, or write them with `limbeck cache`")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}", "the store was altered; write it again with `limbeck cache`") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _VERSION:
        raise UserError(f"{path} is not a manifest of the format {_VERSION}", "write the store again with `limbeck cache`")
    return manifest


class StoreWriter:
    """Writes a teacher's outputs once, to be read many times by `Store`.

    Rows are numbered: view v of sample i is row `i + v * samples` (`key` computes it), and come in order. Each full shard is
    written atomically, then the manifest with its SHA-256; after a kill a new writer with the same arguments goes on at
    `next_index`, having lost less than one shard, and the finished files are the same byte for byte.

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
        self._manifest: dict[str, Any] = {
            "format": _VERSION,
            "teacher": teacher_fingerprint,
            "data": data_fingerprint,
            "preprocessing": preprocessing,
            "samples": samples,
            "views": views,
            "signals": {name: list(shape) for name, shape in self.layout.signals.items()},
            "form": form,
            "k": k,
            "shard_size": shard_size,
            "finished": False,
            "shards": [],
        }
        if (self.folder / _MANIFEST).is_file():
            self._go_on(_read_manifest(self.folder))
        self._buffer: list[dict[str, Tensor]] = []
        self._stored = sum(shard["count"] for shard in self._manifest["shards"])
        self._buffered = 0
        if not self._manifest["finished"]:
            self._check_room()
            self._prepare_folder()

    def _go_on(self, found: dict[str, Any]) -> None:
        """Take over the shards of an earlier writer that are whole, up to the first that is not."""
        ours = json.loads(json.dumps(self._manifest))
        for name, value in ours.items():
            if name not in ("shards", "finished") and found.get(name) != value:
                raise UserError(
                    f"{self.folder} was begun with another {_NAMES.get(name, name)}: {found.get(name)!r} there, {value!r} now",
                    "give the same arguments to go on, or another folder",
                )
        whole = []
        for shard in found["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file() or sha256(path) != shard["sha256"]:
                break
            whole.append(shard)
        self._manifest["shards"] = whole
        self._manifest["finished"] = bool(found["finished"]) and len(whole) == len(found["shards"])

    def _check_room(self) -> None:
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        m = self._manifest
        rows = self.total - self._stored
        need = plan_bytes(rows, self.layout.signals, m["form"], m["k"], 1, self.shard_size)
        free = shutil.disk_usage(place).free
        if need > free:
            raise UserError(
                f"storing the teacher needs {need / 1e9:.3g} GB in {self.folder}, and {free / 1e9:.3g} GB are free",
                "use another folder, form='topk' with a small k, or fewer signals",
            )

    def _prepare_folder(self) -> None:
        """Make the folder, remove what a killed writer left behind, and write the manifest."""
        known = {shard["file"] for shard in self._manifest["shards"]}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(".*.tmp")]:
                if path.name not in known:
                    path.unlink()
            write_json(self.folder / _MANIFEST, self._manifest)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}", "choose a folder that you can write to") from None

    @property
    def next_index(self) -> int:
        """The first row that `write` has not taken yet; after a restart, the first that is not safely on the disk."""
        return self._stored + self._buffered

    @property
    def finished(self) -> bool:
        """Whether the store is complete and can be opened."""
        return bool(self._manifest["finished"])

    def key(self, index: Tensor, view: int = 0) -> Tensor:
        """Rows of view `view` of samples `index`: `index + view * samples`."""
        return index + view * self.samples

    def write(self, index: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Take the next rows.

        Args:
            index: `(B,)` int64 consecutive row numbers that reach `next_index`; rows before it are stored already and left out.
            signals: name to `(B, ...)` values for each planned signal.

        Raises:
            UserError: rows out of order or beyond the end, other shapes, or values that the form cannot hold.
        """
        index = index.detach().cpu()
        if not len(index):
            return
        first, last = int(index[0]), int(index[-1])
        consecutive = torch.equal(index, torch.arange(first, first + len(index)))
        if not consecutive or first > self.next_index or last >= self.total:
            raise UserError(
                f"rows {first} to {last} cannot be stored now: the next is {self.next_index} of {self.total}, and rows come in order",
                "go through the data without shuffling, starting at writer.next_index",
            )
        skip = self.next_index - first
        if skip >= len(index):
            return
        packed = self.layout.pack({name: value[skip:] for name, value in signals.items() if isinstance(value, Tensor)})
        if (rows := {len(value) for value in packed.values()}) != {len(index) - skip}:
            raise UserError(f"{len(index)} rows were announced and {max(rows) + skip} given", "index and signals have one row a sample")
        for first in range(0, len(index) - skip, self.shard_size):
            piece = {name: value[first : first + self.shard_size].clone() for name, value in packed.items()}
            self._buffer.append(piece)
            self._buffered += len(next(iter(piece.values())))
            if self._buffered >= self.shard_size:
                self._flush(self.shard_size)

    def _flush(self, count: int) -> None:
        joined = {name: torch.cat([part[name] for part in self._buffer]) for name in self.layout.tensors()}
        self._buffer = [{name: value[count:].clone() for name, value in joined.items()}]
        file = f"shard-{len(self._manifest['shards']):06d}.safetensors"
        digest = save_tensors(self.folder / file, {name: value[:count] for name, value in joined.items()})
        self._manifest["shards"].append({"file": file, "first": self._stored, "count": count, "sha256": digest})
        self._stored += count
        self._buffered -= count
        write_json(self.folder / _MANIFEST, self._manifest)

    def finish(self) -> None:
        """Write the last, shorter shard and mark the store as complete.

        Raises:
            UserError: rows are missing.
        """
        if self.finished:
            return
        if self.next_index < self.total:
            raise UserError(f"the store is not complete: {self.next_index} of {self.total} rows", "write the others first")
        if self._buffered:
            self._flush(self._buffered)
        self._manifest["finished"] = True
        write_json(self.folder / _MANIFEST, self._manifest)


class Store:
    """A finished store, read at random rows: from memory when it fits in `ram_limit`, else from memory-mapped files.

    Args:
        folder: what `StoreWriter` wrote.
        teacher_fingerprint: of the teacher that is meant; checked when given.
        data_fingerprint: of the data that are meant; checked when given.
        verify: compare every shard with its checksum when opening.
        ram_limit: bytes up to which everything is loaded into memory.

    Raises:
        UserError: no store, an unfinished one, another teacher or other data (both named), a torn or altered shard (named).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher_fingerprint: str | None = None,
        data_fingerprint: str | None = None,
        verify: bool = True,
        ram_limit: int = 2_000_000_000,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        m = self.manifest
        for name, wanted in (("teacher", teacher_fingerprint), ("data", data_fingerprint)):
            if wanted is not None and m[name] != wanted:
                raise UserError(
                    f"{self.folder} was made with another {name}: {_NAMES[name]} {m[name]} there, {wanted} now",
                    f"use the {name} that it was made with, or store again in another folder with `limbeck cache`",
                )
        self.samples, self.views, self.total, self.shard_size = m["samples"], m["views"], m["samples"] * m["views"], m["shard_size"]
        done = sum(shard["count"] for shard in m["shards"])
        if not m["finished"] or done != self.total:
            raise UserError(
                f"the store in {self.folder} is not finished: {done} of {self.total} rows",
                "run the same `limbeck cache` command again; it goes on where it stopped",
            )
        self.layout = Layout(m["signals"], m["form"], m["k"])
        self.in_memory = self.total * self.layout.bytes_per_sample <= ram_limit
        if self.in_memory:
            parts = [load_tensors(self.folder / s["file"], s["sha256"] if verify else None) for s in m["shards"]]
            self._shards = [{name: torch.cat([part[name] for part in parts]) for name in self.layout.tensors()}]
        else:
            self._shards = [self._map(shard, verify) for shard in m["shards"]]

    def _map(self, shard: dict[str, Any], verify: bool) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / shard["file"]
        if not path.is_file() or os.path.getsize(path) < 8 or (verify and sha256(path) != shard["sha256"]):
            load_tensors(path, shard["sha256"])  # says what is wrong with it
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in self.layout.tensors()}
        except (SafetensorError, OSError) as error:
            load_tensors(path)  # says it better when the file is a pickle
            raise UserError(f"{path} is not a readable safetensors file: {error}", "restore or remake it") from None

    def __len__(self) -> int:
        return self.total

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one row on the disk, without the files' headers."""
        return self.layout.bytes_per_sample

    def key(self, index: Tensor, view: int = 0) -> Tensor:
        """Rows of view `view` of samples `index`: `index + view * samples`."""
        return index + view * self.samples

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Rows in any order, with repeats.

        Args:
            index: `(B,)` int64 row numbers (see `key`).

        Returns:
            Name to `(B, ...)`: float32, except in the form "topk", where the logits come as "logits.values" `(B, k)` float16,
            "logits.indices" `(B, k)` int16 or int32 (above 32768 classes), and "logits.rest" `(B,)` float32 (see `dense_logits`).
        """
        index = index.detach().cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.total:
            wrong = f"rows {int(index.min())} to {int(index.max())} were asked for, the store has {self.total}"
            raise UserError(wrong, "the data set is larger than the one that was stored")
        rows = self._rows(index)
        return {name: value if name in (VALUES, INDICES) else value.float() for name, value in rows.items()}

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        if self.in_memory:
            return {name: value.index_select(0, index) for name, value in self._shards[0].items()}
        rows = {name: torch.empty(len(index), *shape, dtype=dtype) for name, (shape, dtype) in self.layout.tensors().items()}
        number = torch.div(index, self.shard_size, rounding_mode="floor")
        for shard in number.unique().tolist():
            here = (number == shard).nonzero().squeeze(1)
            local = index[here] - shard * self.shard_size
            for name, target in rows.items():
                target[here] = self._shards[shard][name].index_select(0, local)
        return rows

    def dense_logits(self, index: Tensor) -> Tensor:
        """`(B, C)` float32 logits in every form; in "topk" the rest mass is spread evenly over the other classes."""
        rows = self.read(index)
        if VALUES in rows:
            return dense_logits(rows[VALUES], rows[INDICES], rows[REST], self.layout.classes)
        return rows["logits"]

    def signals(self, index: Tensor) -> Signals:
        """The rows as `Signals`: dense logits, the embedding, stages ("stages[i]" by number, the others None), paths in `at`."""
        rows = self.read(index)
        said: dict[str, Any] = {name: rows[name] for name in ("embedding",) if name in rows}
        if VALUES in rows:
            said["logits"] = dense_logits(rows[VALUES], rows[INDICES], rows[REST], self.layout.classes)
        elif "logits" in rows:
            said["logits"] = rows["logits"]
        numbered = {int(name[7:-1]): rows[name] for name in rows if name.startswith("stages[") and name[7:-1].isdecimal()}
        if numbered:
            said["stages"] = [numbered.get(i) for i in range(max(numbered) + 1)]
        taken = {*said, VALUES, INDICES, REST, *(f"stages[{i}]" for i in numbered)}
        at = {name.removeprefix("at:"): value for name, value in rows.items() if name not in taken}
        return Signals(at=at, **said)
