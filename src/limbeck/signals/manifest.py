"""The manifest of a store: what it holds, for whom, and which of its shards are whole. Read strictly: an altered one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, PositiveInt, ValidationError

from limbeck.errors import UserError
from limbeck.signals.stored_form import Form, Layout
from limbeck.storage import sha256, write_json

FILE = "manifest.json"
VERSION = "limbeck-store/2"

_AGAIN = "the store was altered or torn; write it again with `limbeck cache`"


def shard_file(number: int) -> str:
    """The name of shard `number`."""
    return f"shard-{number:06d}.safetensors"


class Shard(BaseModel):
    """One shard that is whole: its file, first row, rows, and the SHA-256 of its bytes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    file: str
    first: NonNegativeInt
    count: PositiveInt
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What is written as manifest.json.

    Attributes:
        format: the version of this format.
        teacher, data: fingerprints that the store is bound to.
        preprocessing: how inputs were made.
        samples, views: N, and stored augmentations a sample; a store has `samples * views` rows.
        signals: name to shape of one sample's signal.
        form, k: see `limbeck.signals.stored_form.Layout`.
        shard_size: rows of every shard but the last.
        finished: whether every row is there.
        shards: those that are whole, by their first row; others may be missing between them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["limbeck-store/2"]
    teacher: str
    data: str
    preprocessing: JsonValue
    samples: PositiveInt
    views: PositiveInt
    signals: dict[str, list[NonNegativeInt]]
    form: Form
    k: PositiveInt | None
    shard_size: PositiveInt
    finished: bool
    shards: list[Shard]

    @property
    def total(self) -> int:
        """Rows of the whole store."""
        return self.samples * self.views

    @property
    def stored(self) -> int:
        """Rows of the shards that are whole."""
        return sum(shard.count for shard in self.shards)

    def layout(self) -> Layout:
        """What one row holds."""
        return Layout({name: tuple(shape) for name, shape in self.signals.items()}, self.form, self.k)

    def rows_of(self, number: int) -> tuple[int, int]:
        """First row of shard `number`, and how many it has."""
        first = number * self.shard_size
        return first, min(self.shard_size, self.total - first)

    def write(self, folder: Path) -> None:
        """Write it into a folder, with a digest of itself as its last key."""
        content = self.model_dump()
        write_json(folder / FILE, content | {"digest": _digest(content)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read what `write` wrote.

        Raises:
            UserError: there is none, it has another format, or it is not what was written: altered, torn, or with shards that do not fit.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"no stored teacher outputs in {folder}: no {FILE}", "check the path, or write them with `limbeck cache`")
        try:
            found = json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not readable JSON: {error}", _AGAIN) from None
        if not isinstance(found, dict) or found.get("format") != VERSION:
            raise UserError(f"{path} is not a manifest of the format {VERSION}", "write the store again with `limbeck cache`")
        digest = found.pop("digest", None)
        try:
            manifest = cls.model_validate(found)
            manifest.layout()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path}: {where}: {first['msg']}", _AGAIN) from None
        except UserError as error:
            raise UserError(f"{path}: {error.message}", _AGAIN) from None
        if digest != _digest(found):
            raise UserError(f"{path} was altered: its digest differs from its content", _AGAIN)
        numbers = [shard.first // manifest.shard_size for shard in manifest.shards]
        for number, shard in zip(numbers, manifest.shards):
            if (shard.first, shard.count) != manifest.rows_of(number) or shard.file != shard_file(number):
                raise UserError(f"{path}: {shard.file} cannot hold {shard.count} rows from {shard.first} on", _AGAIN)
        if sorted(set(numbers)) != numbers or (manifest.finished and manifest.stored != manifest.total):
            raise UserError(f"{path}: shards are doubled, out of order or missing", _AGAIN)
        return manifest


def _digest(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())
