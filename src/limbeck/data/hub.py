"""Data sets of the Hugging Face `datasets` library: pictures, numbers and token ids by the types of their columns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.data.folder import check_channels, picture
from limbeck.data.source import IN_MEMORY, Source
from limbeck.data.split import Split, TensorSplit, check_columns, label_name
from limbeck.data.tables import number_labels
from limbeck.errors import UserError, nearest
from limbeck.places import user_path

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
"""Columns of token ids: padded with zeros to the longest, handed to the model by name."""


def kind_of(feature: Any) -> str:
    """What a column holds: "image", "text", "number", "list" or "other"."""
    import datasets

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.Value):
        return "text" if feature.dtype in ("string", "large_string") else "number" if feature.dtype != "null" else "other"
    if isinstance(feature, datasets.ClassLabel):
        return "number"
    return "list" if isinstance(feature, (list, datasets.Sequence, datasets.features.features._ArrayXD)) else "other"


class HFSplit(Split):
    """Rows of a `datasets.Dataset`, turned into tensors batch by batch.

    Args:
        dataset: the rows.
        columns: kind of each input column: "image", "number", "list" or "tokens".
        labels: `(N,)` or `(N, C)`, or None.
        size, channels: of pictures.

    A single picture or list column, or several numbers, become one tensor; anything else is a dict by column.
    """

    def __init__(self, dataset: Any, columns: dict[str, str], labels: Tensor | None, size: int | None, channels: int) -> None:
        self.dataset, self.columns, self.labels, self.size, self.channels = dataset, columns, labels, size, channels

    def __len__(self) -> int:
        return len(self.dataset)

    def _images(self, name: str, values: list[Any]) -> Tensor:
        try:
            pixels = [picture(value, self.size, self.channels) for value in values]
        except (OSError, SyntaxError, AttributeError) as error:
            raise UserError(f"column {name!r} has a picture that cannot be read: {error}", "remove or restore it") from None
        if (other := next((p.shape for p in pixels if p.shape != pixels[0].shape), None)) is not None:
            raise UserError(
                f"pictures differ in size: {list(pixels[0].shape[1:])} and {list(other[1:])} in column {name!r}", "give size= to scale them"
            )
        return torch.stack(pixels)

    def _tensor(self, name: str, values: list[Any]) -> Tensor:
        kind = self.columns[name]
        if kind == "image":
            return self._images(name, values)
        if any(value is None for value in values):
            return torch.full((len(values),), torch.nan)
        try:
            if kind == "tokens":
                rows = [torch.as_tensor(v, dtype=torch.long) for v in values]
                return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return torch.tensor(values, dtype=torch.float32)
        except (ValueError, TypeError) as error:
            raise UserError(f"column {name!r} cannot be made a tensor: {error}", "its rows must be numbers, all of one length") from None

    def tensors(self, rows: dict[str, list[Any]]) -> Any:
        """Inputs from rows by column; pictures are still uint8."""
        made = {name: self._tensor(name, rows[name]) for name in self.columns}
        if "input_ids" in made and "attention_mask" not in made:
            lengths = torch.tensor([len(v) for v in rows["input_ids"]])
            made["attention_mask"] = (torch.arange(made["input_ids"].shape[1]) < lengths[:, None]).long()
        if set(self.columns.values()) == {"number"}:
            return torch.stack(list(made.values()), 1)
        if len(made) == 1 and next(iter(self.columns.values())) in ("image", "list"):
            return next(iter(made.values()))
        return made

    def batch(self, index: Tensor) -> Batch:
        """The samples at `index`."""
        index = index.cpu()
        inputs = self.tensors(self.dataset[index.tolist()])
        labels = None if self.labels is None else self.labels.index_select(0, index)
        scaled: Callable[[Tensor], Tensor] = lambda x: x.float().div_(255) if x.dtype == torch.uint8 else x  # noqa: E731
        return Batch({k: scaled(v) for k, v in inputs.items()} if isinstance(inputs, dict) else scaled(inputs), labels, index)

    def subset(self, index: Tensor) -> HFSplit:
        """The rows at `index`; nothing is read yet."""
        other = copy.copy(self)
        other.dataset = self.dataset.select(index.tolist())
        other.labels = None if self.labels is None else self.labels.index_select(0, index)
        return other

    def in_memory(self) -> Split:
        """The same samples as tensors when they fit into 1 GiB, else itself."""
        if not len(self):
            return self
        first = self.tensors(self.dataset[:1])
        size = sum(t.nbytes for t in (first.values() if isinstance(first, dict) else [first]))
        if size * len(self) > IN_MEMORY or (isinstance(first, dict) and any(t.dtype == torch.uint8 for t in first.values())):
            return self
        return TensorSplit(self.tensors(self.dataset[:]), self.labels)


def _tokenised(dataset: Any, tokenizer: str, length: int, text: list[str]) -> Any:
    try:
        import transformers

        coder = transformers.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except ImportError:
        raise UserError("transformers is not installed", "`pip install 'limbeck[hf]'`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {tokenizer}: {str(error).splitlines()[0]}", "give a tokenizer's folder or hub id") from None
    code = lambda rows: coder(*(rows[t] for t in text[:2]), truncation=True, max_length=length, padding="max_length")  # noqa: E731
    return dataset.map(code, batched=True, load_from_cache_file=False).remove_columns(text)


def _labels(dataset: Any, name: str | None, classes: tuple[str, ...] | None) -> tuple[Tensor | None, tuple[str, ...] | None]:
    if name is None:
        return None, None
    feature, values = dataset.features[name], list(dataset[name])
    if hasattr(feature, "names"):
        return torch.tensor(values, dtype=torch.long), tuple(feature.names)
    if values and isinstance(values[0], list):
        return torch.tensor(values, dtype=torch.float32), None
    if kind_of(feature) == "number" and all(isinstance(v, int) for v in values):
        return torch.tensor(values, dtype=torch.long), None
    numbers, own = number_labels(values, "the data set")
    if classes is not None:
        if strange := [c for c in own if c not in classes]:
            offer = " or ".join(map(repr, nearest(strange[0], classes)))
            raise UserError(f"test data has the class {strange[0]!r}, which training lacks", f"did you mean {offer}?")
        numbers = torch.tensor([classes.index(c) for c in own])[numbers]
    return numbers, classes or own


def rows_split(
    dataset: Any,
    label: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    columns: list[str] | None = None,
    tokenizer: str | None = None,
    length: int = 128,
    classes: tuple[str, ...] | None = None,
) -> tuple[Split, tuple[str, ...] | None, bool, bool]:
    """(split, class names, whether it is pictures, whether it is a table) of one `datasets.Dataset`; arguments as `read_hub`."""
    check_channels(channels, size)
    names = list(dataset.column_names)
    target = label_name(names, label, "the data set")
    check_columns(columns, names, "the data set")
    used = columns or [n for n in names if n != target and n not in ("idx", "id")]
    text = [n for n in used if kind_of(dataset.features[n]) == "text"]
    if tokenizer and text:
        dataset = _tokenised(dataset, tokenizer, length, text)
        used = [n for n in used if n not in text] + [n for n in TOKENS if n in dataset.column_names]
    kinds = {n: "tokens" if n in TOKENS else kind_of(dataset.features[n]) for n in used if n in dataset.features}
    kinds = {n: k for n, k in kinds.items() if k in ("image", "number", "list", "tokens")}
    if not kinds:
        hint = "give tokenizer: <folder or hub id>" if text else "columns may hold pictures, numbers or token ids"
        raise UserError(f"the data set has no column that can be an input; its columns are {', '.join(names)}", hint)
    if channels is None:
        first = next((dataset[0][n] for n, k in kinds.items() if k == "image" and len(dataset)), None)
        channels = 1 if first is not None and first.mode in ("1", "L") else 3
    labels, own = _labels(dataset, target, classes)
    split = HFSplit(dataset, kinds, labels, size, channels).in_memory()
    return split, own, "image" in kinds.values() and len(kinds) == 1, set(kinds.values()) == {"number"}


def rows_source(parts: dict[str, Any], **args: Any) -> Source:
    """The Source of `datasets.Dataset`s by part; names such as "validation" are understood; arguments as `read_hub`."""
    validation = parts.get("valid", parts.get("validation", parts.get("val")))
    training = parts.get("train", next(iter(parts.values())) if len(parts) == 1 else None)
    if training is None:
        raise UserError(f"the data set has no train part, only {', '.join(map(str, parts))}", "name one of them train")
    train, classes, images, table = rows_split(training, **args)
    others = [None if p is None else rows_split(p, **args, classes=classes)[0] for p in (parts.get("test"), validation)]
    test, valid = others
    if test is not None and test.labels is not None and len(test) and bool((test.labels == -1).all()) and valid is not None:
        test, valid = valid, None  # Hubs hide the test labels of some benchmarks; their validation part is what can be scored.
    note = {k: str(v) for k, v in args.items() if v is not None and (k != "length" or args.get("tokenizer"))}
    return Source(train, test, valid, classes, images, table, note=note)


def open_hub(path: str, config: str | None = None, streaming: bool = False) -> Any:
    """What the datasets library opens: by hub id, or a folder that it wrote (`save_to_disk`) or can read.

    Args:
        path: id or folder.
        config: which configuration of the data set.
        streaming: read rows as they come instead of preparing the whole set first.

    Raises:
        UserError: `datasets` is not installed, or the data set cannot be opened.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("datasets is not installed", "`pip install 'limbeck[hf]'`") from None
    folder = user_path(path)
    if path.startswith((".", "/", "~")) and not folder.exists():
        raise UserError(f"no folder at {folder}", "check the path after hf:")
    saved = any((folder / n).is_file() for n in ("dataset_dict.json", "state.json"))
    try:
        if not saved:
            return datasets.load_dataset(str(folder) if folder.is_dir() else path, config, streaming=streaming)
        loaded = datasets.load_from_disk(str(folder))
        if not streaming:
            return loaded
        one = isinstance(loaded, datasets.Dataset)
        return loaded.to_iterable_dataset() if one else {part: rows.to_iterable_dataset() for part, rows in loaded.items()}
    except Exception as error:  # The library raises a dozen kinds, all about the id, the files or the network.
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be opened: {why}", "check the id or folder; hub ids need the network or a filled cache") from None


def read_hub(
    path: str,
    label: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    columns: list[str] | None = None,
    tokenizer: str | None = None,
    length: int = 128,
    config: str | None = None,
) -> Source:
    """A data set by hub id, or a folder that `save_to_disk` wrote.

    Args:
        path: id or folder.
        label: label column; found by its name when None.
        size, channels: of pictures; None keeps the size, and takes 1 channel when the first is grey, else 3.
        columns: inputs; None takes all that are pictures, numbers or token ids.
        tokenizer: folder or hub id of a transformers tokenizer for text columns (two at most, as a pair).
        length: tokens of a text; longer ones are cut, shorter ones padded.
        config: which configuration of the data set.

    Raises:
        UserError: `datasets` is not installed, the data set cannot be opened, or columns are missing or unusable.
    """
    loaded = open_hub(path, config)
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    args = {"label": label, "size": size, "channels": channels, "columns": columns, "tokenizer": tokenizer, "length": length}
    return rows_source(parts, **args)
