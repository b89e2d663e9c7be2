"""From a name, a path or a Python object to `Data`: read, split, scale, check, hide, mislabel labels, fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.data.arguments import check_arguments
from limbeck.data.batches import own_randomness
from limbeck.data.choose import amount, hide, mislabel, stratified
from limbeck.data.data import Data
from limbeck.data.embedded import EMBEDDED
from limbeck.data.source import Source, check_classes, check_split
from limbeck.data.split import DatasetSplit, LoaderSplit, Split, TensorSplit
from limbeck.data.streaming import StreamSplit
from limbeck.errors import UserError, unknown
from limbeck.storage import fingerprint, tensors_fingerprint

KINDS = ("multiclass", "multilabel", "binary")


def _readers() -> dict[str, Callable[..., Source]]:
    from limbeck.data.folder import read_folder
    from limbeck.data.graphs import read_geometric
    from limbeck.data.hub import read_hub
    from limbeck.data.idx import read_idx_folder
    from limbeck.data.shards import read_stream
    from limbeck.data.tables import read_csv, read_parquet

    return {
        "hf": read_hub,
        "folder": read_folder,
        "csv": read_csv,
        "parquet": read_parquet,
        "stream": read_stream,
        "idx": read_idx_folder,
        "pyg": read_geometric,
    }


def _read(source: Any, args: dict[str, Any]) -> tuple[str, Source]:
    if not isinstance(source, str):
        from limbeck.data.objects import read_object

        check_arguments(read_object, {"source": source, **args}, f"data given as {type(source).__name__}")
        return type(source).__name__, read_object(source, **args)
    kind, colon, path = source.partition(":")
    if not colon:
        if source not in EMBEDDED:
            raise unknown("data", source, EMBEDDED, "limbeck data")
        check_arguments(EMBEDDED[source], args, f"data {source!r}")
        return source, EMBEDDED[source](**args)
    readers = _readers()
    if kind not in readers:
        raise unknown("kind of data", kind, readers, "limbeck data")
    check_arguments(readers[kind], {"path": path, **args}, f"data {source!r}")
    return source, readers[kind](path, **args)


def _draw(split: Split, count: int | float, part: str, seed: int) -> tuple[Split, Split]:
    """(drawn, rest): `count` samples and what is left."""
    if isinstance(split, LoaderSplit):
        split.subset(torch.empty(0))
    size = amount(count, len(split), part)
    if size == len(split):
        raise UserError(f"{part} asks for all {size} samples and leaves none to train on", f"ask for fewer than {size}")
    if isinstance(split, StreamSplit):
        return split.hold_out(size)
    chosen = stratified(split.labels, len(split), size, seed)
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[chosen] = False
    return split.subset(chosen), split.subset(rest.nonzero()[:, 0])


def _keep(split: Split, count: int | float | None, part: str, seed: int) -> Split:
    if count is None:
        return split
    size = amount(count, len(split), part)
    return split if size == len(split) else split.subset(stratified(split.labels, len(split), size, seed))


def _standardise(train: TensorSplit, parts: list[Split | None]) -> None:
    mean, deviation = train.inputs.mean(0), train.inputs.std(0, correction=0)  # type: ignore[union-attr]
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    for part in parts:
        if isinstance(part, TensorSplit):
            part.inputs = (part.inputs - mean) / deviation  # type: ignore[operator]


def _mark(split: Split | None) -> Any:
    """What stands for a split's content: all of it in memory, else its length, its labels and 64 samples spread over it."""
    if split is None:
        return None
    if isinstance(split, TensorSplit):
        return tensors_fingerprint(split.tensors())
    if isinstance(split, StreamSplit):
        return [len(split), split.rows.mark()]
    if isinstance(split, LoaderSplit):
        count = min(4, len(split))
        sample = split.batch(torch.arange(min(count, len(next(iter(split))))))
    else:
        sample = split.batch(torch.linspace(0, len(split) - 1, min(64, len(split))).long())
    inputs = sample.inputs if isinstance(sample.inputs, dict) else {"inputs": sample.inputs}
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    return [len(split), tensors_fingerprint(tensors), None if split.labels is None else tensors_fingerprint({"y": split.labels})]


def _shape(split: Split) -> tuple[int, ...]:
    inputs = split.batch(torch.arange(1)).inputs
    if isinstance(inputs, dict):
        inputs = next((inputs[k] for k in ("pixel_values", "input_ids") if k in inputs), next(iter(inputs.values())))
    return tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()


def _name_classes(source: Source, labels: Tensor | None) -> tuple[str, ...]:
    if labels is None or source.classes is not None:
        return source.classes or ()
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    return tuple(str(n) for n in range(count))


def open_data(
    source: Any,
    *,
    train: int | float | None = None,
    test: int | float | None = None,
    valid: int | float | None = None,
    labelled: int | None = None,
    seed: int = 0,
    label: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    kind: str | None = None,
    label_noise: dict[str, Any] | None = None,
    **args: Any,
) -> Data:
    """Open data by name, by path or from Python objects.

    Args:
        source: an embedded name (`limbeck.data.listing()`); `hf:<id or folder>`, `folder:<pictures>`, `csv:<file>`,
            `parquet:<file>`, `stream:<shards>`, `idx:<folder>`; or `(inputs, labels)` tensors, a dict with `train` and perhaps `test` and
            `valid`, a torch Dataset or DataLoader, a `datasets.Dataset` or `DatasetDict`.
        train, test, valid: samples drawn for each part, a count or a share of what it is drawn from; every class in its
            share. `test` is drawn first, so that it does not change with the others; `valid` is taken from the training part.
            None keeps what there is; a source without a test part gives 20 % (450 of digits, 25 % of the small tables).
        labelled: keep this many training labels, as many in each class, and hide the others.
        seed: of the draws.
        label: name of the label column or key.
        size, channels: pictures are scaled to `size` x `size` and turned into 1 or 3 channels.
        kind: "multiclass", "multilabel" or "binary"; None tells by the labels (`(N,)` whole numbers are multiclass).
        label_noise: `{share: 0.6, classes: [5, 6]}` gives this share of the training samples of these classes (all when left out) a label
            drawn from them; valid and test stay clean.
        args: what the source itself takes, such as `classes=94` of glyphs.

    Raises:
        UserError: anything that the user can mend: a missing file, an unknown name, NaN, too few samples, ...
    """
    for name, value in (("label", label), ("size", size), ("channels", channels)):
        if value is not None:
            args[name] = value
    if kind is not None and kind not in KINDS:
        raise unknown("kind", str(kind), KINDS)
    # Items with randomness of their own must neither move the caller's generators nor change the fingerprint.
    with own_randomness(seed):
        return _opened(source, args, {"train": train, "test": test, "valid": valid}, labelled, seed, kind, label_noise)


def _opened(
    source: Any,
    args: dict[str, Any],
    counts: dict[str, int | float | None],
    labelled: int | None,
    seed: int,
    kind: str | None,
    noise: dict[str, Any] | None = None,
) -> Data:
    train, test, valid = counts["train"], counts["test"], counts["valid"]
    name, read = _read(source, args)
    for part in ("train", "test", "valid"):
        if (given := getattr(read, part)) is not None:
            check_split(given, part)
            if isinstance(given, DatasetSplit) and given.labels is None:
                given.labels = given.read_labels()
    training, testing, validating = read.train, read.test, read.valid
    classes = _name_classes(read, training.labels)
    if testing is None:
        testing, training = _draw(training, read.test_count if test is None else test, "test", seed)
    else:
        testing = _keep(testing, test, "test", seed)
    if validating is None and valid is not None:
        validating, training = _draw(training, valid, "valid", seed + 1)
    elif validating is not None:
        validating = _keep(validating, valid, "valid", seed + 1)
    training = _keep(training, train, "train", seed + 2)
    if read.standardise and isinstance(training, StreamSplit):
        mean, deviation = training.standardise()
        for part in (testing, validating):
            if isinstance(part, TensorSplit):
                part.inputs = (part.inputs - mean) / deviation
    elif read.standardise and isinstance(training, TensorSplit) and isinstance(training.inputs, Tensor):
        _standardise(training, [testing, validating, training])
    for part, given in (("train", training), ("test", testing), ("valid", validating)):
        if given is not None:
            check_classes(given.labels, classes, part)
    shape = _shape(training) if read.shape is None else read.shape
    if (other := _shape(testing)) != shape and read.images:
        raise UserError(f"train samples have shape {shape}, but test samples have {other}", "give size= to scale them alike")
    if noise is not None:
        if not isinstance(noise, dict) or set(noise) - {"share", "classes"} or "share" not in noise:
            raise UserError(f"label_noise is {noise!r}", "write {share: 0.6, classes: [5, 6]}")
        training = training.with_labels(mislabel(training.labels, noise["share"], noise.get("classes"), len(classes), seed))
    mark = fingerprint([_mark(training), _mark(testing), _mark(validating), read.note, kind, labelled, seed if labelled else None])
    true = None
    if labelled is not None:
        if isinstance(training, StreamSplit):
            training.with_labels(None)
        if training.labels is None:
            raise UserError("labelled was asked for, but the data has no labels", "leave it out")
        keep = amount(labelled, len(training), "labelled")
        true, training = training.labels, training.with_labels(hide(training.labels, keep, seed))
    if kind is None:
        kind = "multilabel" if training.labels is not None and training.labels.ndim == 2 else "multiclass"
    pictures = read.images or (len(shape) == 3 and shape[0] in (1, 3))
    return Data(name, training, testing, validating, shape, classes, kind, mark, pictures, true)
