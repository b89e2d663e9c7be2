"""Stored teacher outputs, read at random rows (`store_writer` writes them, `manifest` says what they are)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.signals.manifest import Manifest, Shard
from limbeck.signals.signals import Signals
from limbeck.signals.store_writer import NAMES, StoreWriter
from limbeck.signals.stored_form import INDICES, REST, VALUES, dense_logits, model_fingerprint, plan_bytes
from limbeck.storage import load_tensors, sha256

__all__ = ["Store", "StoreWriter", "dense_logits", "model_fingerprint", "plan_bytes"]


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
        m = self.manifest = Manifest.read(self.folder)
        for name, wanted in (("teacher", teacher_fingerprint), ("data", data_fingerprint)):
            if wanted is not None and getattr(m, name) != wanted:
                raise UserError(
                    f"{self.folder} was made with another {name}: {NAMES[name]} {getattr(m, name)} there, {wanted} now",
                    f"use the {name} that it was made with, or store again in another folder with `limbeck cache`",
                )
        self.samples, self.views, self.total, self.shard_size = m.samples, m.views, m.total, m.shard_size
        if not m.finished:
            raise UserError(
                f"the store in {self.folder} is not finished: {m.stored} of {self.total} rows",
                "run the same `limbeck cache` command again; it goes on where it stopped",
            )
        self.layout = m.layout()
        self.in_memory = self.total * self.layout.bytes_per_sample <= ram_limit
        if self.in_memory:
            parts = [self._checked(load_tensors(self.folder / s.file, s.sha256 if verify else None), s) for s in m.shards]
            self._shards = [{name: torch.cat([part[name] for part in parts]) for name in self.layout.tensors()}]
        else:
            self._shards = [self._checked(self._map(shard, verify), shard) for shard in m.shards]

    def _map(self, shard: Shard, verify: bool) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / shard.file
        if not path.is_file() or os.path.getsize(path) < 8 or (verify and sha256(path) != shard.sha256):
            load_tensors(path, shard.sha256)  # says what is wrong with it
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            load_tensors(path)  # says it better when the file is a pickle
            raise UserError(f"{path} is not a readable safetensors file: {error}", "restore or remake it") from None

    def _checked(self, found: dict[str, Tensor], shard: Shard) -> dict[str, Tensor]:
        """The tensors of a shard, if they are what the manifest says: names, shapes, types."""
        wanted = {name: ((shard.count, *shape), dtype) for name, (shape, dtype) in self.layout.tensors().items()}
        if {name: (tuple(value.shape), value.dtype) for name, value in found.items()} != wanted:
            raise UserError(
                f"{self.folder / shard.file} does not hold what the manifest says", "write the store again with `limbeck cache`"
            )
        return found

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
