"""Where streams come from: Parquet shards, and streams of the `datasets` library."""

from __future__ import annotations

import copy
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck import storage
from limbeck.data.choose import generator
from limbeck.data.folder import check_channels
from limbeck.data.hub import HFSplit, kind_of, open_hub
from limbeck.data.source import Source
from limbeck.data.split import TensorSplit, check_columns, label_name
from limbeck.data.streaming import Piece, Rows, StreamSplit
from limbeck.errors import UserError
from limbeck.places import user_path

_PARTS = {"test": "test", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid"}

BUFFER = 4096
"""Rows that are mixed with each other when nobody says."""


class ParquetRows(Rows):
    """Parquet files; a row group is a piece, and the only thing of a file that is ever held.

    Args:
        files: in the order in which rows are numbered.

    Raises:
        UserError: a file cannot be read, or has other columns than the first one.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.held = list(files), np.zeros(0, np.int64)
        self.groups: list[tuple[int, int]] = []
        self.schema, sizes, marks = None, [], []
        for number, file in enumerate(self.files):
            facts = _facts(file)
            own = facts.schema.to_arrow_schema()
            if self.schema is None:
                self.schema = own
            elif own.remove_metadata() != self.schema.remove_metadata():
                raise UserError(f"{file} has other columns than {self.files[0]}", "give shards of one table")
            for group in range(facts.num_row_groups):
                self.groups.append((number, group))
                sizes.append(facts.row_group(group).num_rows)
            marks.append([file.stat().st_size, _footer(file)])
        self._marks = marks
        self._sources = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # where each group begins in the files
        self._starts = self._sources  # the same without held rows
        self._kept: tuple[int, Any] | None = None

    @property
    def count(self) -> int:  # type: ignore[override]
        """Rows that are not held out."""
        return int(self._starts[-1])

    def piece(self, number: int) -> Any:
        """The table of one row group without held rows; the one that was read last is kept."""
        import pyarrow.parquet

        if self._kept is None or self._kept[0] != number:
            file, group = self.groups[number]
            try:
                with pyarrow.parquet.ParquetFile(self.files[file]) as reader:
                    table = reader.read_row_group(group)
            except Exception as error:  # as in `_facts`
                raise UserError(f"{self.files[file]} cannot be read at row group {group}: {error}", "restore the file") from None
            rows = np.arange(self._sources[number], self._sources[number + 1])
            self._kept = number, table.filter(~np.isin(rows, self.held)) if len(self.held) else table
        return self._kept[1]

    def ordered(self, seed: int, epoch: int, shuffle: bool, first: int) -> Iterator[Piece]:
        """See `Rows.ordered`; only row groups that are needed are read."""
        count, place = len(self.groups), 0
        order = torch.randperm(count, generator=generator(seed, epoch, 0)).tolist() if shuffle else range(count)
        for number in order:
            begin, end = int(self._starts[number]), int(self._starts[number + 1])
            skip = max(0, first - place)
            if skip < end - begin:
                yield np.arange(begin + skip, end), self.piece(number).slice(skip)
            place += end - begin

    def take(self, numbers: np.ndarray) -> Any:
        """See `Rows.take`; rows of one row group cost reading it once."""
        import pyarrow

        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.count:
            raise UserError(f"rows {numbers.min()} to {numbers.max()} were asked for, there are {self.count}", "ask for fewer")
        of = np.searchsorted(self._starts, numbers, side="right") - 1
        places = [np.flatnonzero(of == piece) for piece in np.unique(of)]
        parts = [self.piece(int(of[own[0]])).take(numbers[own] - self._starts[of[own[0]]]) for own in places]
        return pyarrow.concat_tables(parts).take(np.argsort(np.concatenate(places)))

    def without(self, count: int) -> tuple[Any, ParquetRows]:
        """See `Rows.without`: rows evenly spread over all files, because files are often sorted."""
        chosen = np.linspace(0, self.count - 1, count).astype(np.int64)
        other = copy.copy(self)
        rows = self._rows_of(chosen)
        other.held, other._kept = np.union1d(self.held, rows), None
        other._starts = self._sources - np.searchsorted(other.held, self._sources)
        return self.take(chosen), other

    def _rows_of(self, positions: np.ndarray) -> np.ndarray:
        """Numbers in the files of positions among the rows that are not held out."""
        return positions + np.searchsorted(self.held - np.arange(len(self.held)), positions, side="right")

    def mark(self) -> Any:
        """Size and footer of each file: rows, statistics and places of every column's pieces."""
        return [self._marks, storage.fingerprint(self.held.tolist())]


class HubRows(Rows):
    """A stream of the `datasets` library; going to a place reads through what lies before it.

    Args:
        dataset: a `datasets.IterableDataset`.
        count: its rows.
        mark: what it is known by.
    """

    AT_ONCE = 256

    def __init__(self, dataset: Any, count: int, mark: Any) -> None:
        self.dataset, self.count, self._mark = dataset, count, mark
        self.schema = dataset.features.arrow_schema

    def ordered(self, seed: int, epoch: int, shuffle: bool, first: int) -> Iterator[Piece]:
        """See `Rows.ordered`; the library permutes its shards."""
        stream = self.dataset
        if shuffle:
            stream = stream.shuffle(seed=seed, buffer_size=1)
            stream.set_epoch(epoch)
        left = self.count - first
        for table in (stream.skip(first) if first else stream).with_format("arrow").iter(batch_size=self.AT_ONCE):
            yield None, table.slice(0, left)
            left -= table.num_rows
            if left <= 0:
                return
        if left > 0:
            raise UserError(f"the stream ended {left} rows before its {self.count}", "give the true number with data.args.rows")

    def take(self, numbers: np.ndarray) -> Any:
        """The first rows only.

        Raises:
            UserError: others are asked for.
        """
        if len(numbers) > self.AT_ONCE or numbers.tolist() != list(range(len(numbers))):
            hint = "stored teacher outputs and histories need Parquet files (stream:<folder>)"
            raise UserError("a hub's stream has no row numbers", hint)
        return next(self.dataset.with_format("arrow").iter(batch_size=len(numbers)))

    def without(self, count: int) -> tuple[Any, HubRows]:
        """See `Rows.without`: the first rows of the stream."""
        import pyarrow

        tables = list(self.dataset.take(count).with_format("arrow").iter(batch_size=self.AT_ONCE))
        return pyarrow.concat_tables(tables), HubRows(self.dataset.skip(count), self.count - count, [self._mark, count])

    def mark(self) -> Any:
        """As it was given."""
        return self._mark


def _facts(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow, which is not installed", "`pip install 'limbeck[parquet]'`") from None
    try:
        return pyarrow.parquet.read_metadata(file)
    except Exception as error:  # readers raise a dozen kinds, all about the file
        raise UserError(f"{file} is not a readable Parquet file: {error}", "restore the file; it may be truncated") from None


def _footer(file: Path) -> str:
    """The digest of a file's footer. (To have pyarrow put it into words ends the whole process where it was altered.)"""
    with file.open("rb") as opened:
        opened.seek(-8, os.SEEK_END)
        size = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - size, os.SEEK_END)
        return storage.sha256(opened.read(size))[:16]


# ---- from columns to tensors ----


def _features(schema: Any) -> Any:
    """Column types as `datasets` knows them; pictures without its note are told by their fields bytes and path."""
    import datasets

    found = datasets.Features.from_arrow_schema(schema)
    for name, feature in found.items():
        if isinstance(feature, dict) and {"bytes", "path"} == set(feature):
            found[name] = datasets.Image()
    return found


def _decoded(features: Any, table: Any, names: Sequence[str]) -> Any:
    try:
        return features.decode_batch({name: table[name].to_pylist() for name in names})
    except Exception as error:  # readers of pictures raise a dozen kinds, all about the rows
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"rows of the stream cannot be read: {why}", "restore or remove the shard with them") from None


class Decoder:
    """Makes inputs and labels of a table's rows.

    Args:
        columns: kind of each input column, see `limbeck.data.hub.HFSplit`.
        features: types of all columns.
        target: the label's column; None where there is none.
        names: the classes as the column has them, in the order of their numbers.
        size, channels: of pictures.
    """

    def __init__(
        self, columns: dict[str, str], features: Any, target: str | None, names: tuple[Any, ...], size: int | None, channels: int
    ) -> None:
        self.features, self.target, self.numbers = features, target, {name: number for number, name in enumerate(names)}
        self._reader = HFSplit(None, columns, None, size, channels)
        self.columns = columns

    def __call__(self, table: Any) -> tuple[Any, Tensor | None]:
        """`(inputs, labels)` of a `pyarrow.Table`; pictures are still uint8."""
        table_of_numbers = set(self.columns.values()) == {"number"}
        needed = [*([] if table_of_numbers else self.columns), *([] if self.target is None else [self.target])]
        rows = _decoded(self.features, table, needed)
        if table_of_numbers:
            values = [table[name].to_numpy().astype(np.float32) for name in self.columns]  # of a missing value NaN
            inputs = torch.from_numpy(np.stack(values, 1))
        else:
            inputs = self._reader.tensors(rows)
        if self.target is None:
            return inputs, None
        labels = rows[self.target]
        if strange := [label for label in labels if label not in self.numbers]:
            known, hint = len(self.numbers), "name all in data.args.classes; every row needs a label"
            raise UserError(f"the stream has the class {strange[0]!r}, which is none of its {known}", hint)
        return inputs, torch.tensor([self.numbers[label] for label in labels], dtype=torch.long)


def _classes(rows: Rows, target: str | None, feature: Any, given: int | list[Any] | None) -> tuple[tuple[Any, ...], tuple[str, ...] | None]:
    """(classes as the column has them, their names): from the column's type, as given, or by reading the label column once."""
    if target is None:
        return (), None
    if hasattr(feature, "names"):
        if given is not None and given not in (len(feature.names), list(feature.names)):
            own = ", ".join(feature.names)
            raise UserError(f"data.args.classes is {given}, and column {target!r} has the classes {own}", "leave it out")
        return tuple(range(len(feature.names))), tuple(feature.names)
    if given is not None:
        names = tuple(range(given)) if isinstance(given, int) else tuple(given)
        return names, tuple(map(str, names))
    if not isinstance(rows, ParquetRows):
        raise UserError(f"the classes of column {target!r} are not known before the stream ends", "name them with data.args.classes")
    import pyarrow.compute
    import pyarrow.parquet

    found: set[Any] = set()
    for file in rows.files:
        try:
            with pyarrow.parquet.ParquetFile(file) as reader:
                for part in reader.iter_batches(columns=[target]):
                    found |= set(pyarrow.compute.unique(part.column(0)).to_pylist())
        except Exception as error:  # as in `_facts`
            raise UserError(f"the column {target!r} of {file} cannot be read as classes: {error}", "restore the file") from None
    if None in found:
        raise UserError(f"column {target!r} has rows without a label", "remove or fill them")
    if any(isinstance(value, float) and value % 1 for value in found):
        raise UserError(f"column {target!r} holds fractions, which are no classes", "name the label's column with data.label")
    names = tuple(sorted(found))
    return names, tuple(str(int(name) if isinstance(name, float) else name) for name in names)


def _decoder(
    rows: Rows, label: str | None, columns: list[str] | None, classes: Any, size: int | None, channels: int | None
) -> tuple[Decoder, tuple[str, ...] | None]:
    features = _features(rows.schema)
    names = list(features)
    target = label_name(names, label, "the stream")
    check_columns(columns, names, "the stream")
    kinds = {name: kind_of(features[name]) for name in columns or names if name != target and name not in ("idx", "id")}
    used = {name: kind for name, kind in kinds.items() if kind in ("image", "number", "list")}
    if not used:
        raise UserError(
            f"the stream has no column that can be an input; its columns are {', '.join(names)}",
            "columns may hold pictures or numbers; texts are streamed by a recipe with a `text` block (parquet:, hf: with streaming)",
        )
    held, own = _classes(rows, target, features[target] if target else None, classes)
    made = Decoder(used, features, target, held, size, 3 if channels is None else channels)
    if channels is None and "image" in used.values():
        column = next(name for name, kind in used.items() if kind == "image")
        first = _decoded(features, rows.take(np.arange(1)), [column])[column][0]
        made = Decoder(used, features, target, held, size, 1 if first.mode in ("1", "L") else 3)
    return made, own


# ---- opening ----


def _files(path: str) -> dict[str, list[Path]]:
    place = user_path(path)
    found = sorted(place.rglob("*.parquet")) if place.is_dir() else sorted(Path(name) for name in glob.glob(str(place)))
    if not found:
        raise UserError(f"no Parquet files at {place}", "give a folder of .parquet files, one, or a pattern such as data/train-*.parquet")
    parts: dict[str, list[Path]] = {"train": [], "test": [], "valid": []}
    for file in found:
        words = file.relative_to(place).as_posix() if place.is_dir() else file.name
        word = re.match(r"[a-z]*", words.lower())
        parts[_PARTS.get(word[0] if word else "", "train")].append(file)
    if not parts["train"]:
        raise UserError(f"{place} has test files only", "begin the names of training files with train")
    return parts


def _hub(path: str, config: str | None, rows: int | None) -> dict[str, Rows]:
    loaded = open_hub(path, config, streaming=True)
    loaded = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    names = {"validation": "valid", "val": "valid", "dev": "valid"}
    found: dict[str, Rows] = {}
    for part, stream in loaded.items():
        known = (getattr(stream.info, "splits", None) or {}).get(part)
        count = rows if rows is not None and part == "train" else None if known is None else known.num_examples
        if stream.features is None:
            raise UserError(f"{path} does not tell the types of its columns", "stream its Parquet files: stream:<folder>")
        if not count:
            raise UserError(f"{path} does not tell how many rows {part} has", "give data.args.rows")
        found[names.get(part, part)] = HubRows(stream, count, [path, config, part, str(stream.info.version), count])
    return found


def read_stream(
    path: str,
    label: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    columns: list[str] | None = None,
    classes: int | list[Any] | None = None,
    buffer: int = BUFFER,
    rows: int | None = None,
    config: str | None = None,
) -> Source:
    """Rows that are never held all at once: `stream:<folder, file or pattern of Parquet files>`, or `stream:hf:<id or folder>`.

    Files whose names begin with test or valid are those parts; else rows evenly spread over the files are held out (of a hub's stream
    the first ones). Test and validation parts are held in memory.

    Args:
        path: Parquet files, or hf: and what `datasets` opens.
        label: the label's column; found by its name when None.
        size, channels: of pictures; None keeps the size, and takes 1 channel when the first is grey, else 3.
        columns: inputs; None takes all that are pictures or numbers.
        classes: how many, or their values in order, where the column's type does not tell; else the label column of Parquet files is read.
        buffer: rows that are mixed with each other.
        rows: how many a hub's stream has, where it does not tell.
        config: which configuration of a hub's data set.

    Raises:
        UserError: no files, a missing or unusable column, classes or numbers of rows that are not known.
    """
    check_channels(channels, size)
    if path.startswith("hf:"):
        parts = _hub(path[3:], config, rows)
    else:
        for name, value in (("rows", rows), ("config", config)):
            if value is not None:
                raise UserError(f"data.args.{name} is for stream:hf:, and {path} is Parquet files", "leave it out")
        parts = {part: ParquetRows(files) for part, files in _files(path).items() if files}
    if "train" not in parts:
        raise UserError(f"{path} has no train part, only {', '.join(parts)}", "name one of them train")
    train = parts["train"]
    try:
        decode, names = _decoder(train, label, columns, classes, size, channels)
    except ImportError:
        raise UserError("datasets is not installed", "`pip install 'limbeck[hf]'`") from None
    if "image" not in decode.columns.values() and (size, channels) != (None, None):
        raise UserError("data.size and data.channels are for pictures, and the stream has none", "leave them out")
    table = set(decode.columns.values()) == {"number"}
    others = {part: TensorSplit(*decode(_whole(parts[part]))) for part in ("test", "valid") if part in parts}
    note = [{part: own.mark() for part, own in parts.items()}, decode.columns, decode.target, size, channels, buffer]
    pictures = list(decode.columns.values()) == ["image"]
    return Source(StreamSplit(train, decode, buffer), others.get("test"), others.get("valid"), names, pictures, table, note=note)


def _whole(rows: Rows) -> Any:
    import pyarrow

    return pyarrow.concat_tables([table for _, table in rows.ordered(0, 0, False, 0)])
