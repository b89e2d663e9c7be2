"""IDX files, the format of MNIST and its kin, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.data.source import Source
from limbeck.data.split import TensorSplit
from limbeck.errors import UserError

_DEFLATE = 1032
"""The most bytes that one byte of gzip can stand for."""

_PARTS = {"train": ("train",), "test": ("t10k", "test"), "valid": ("valid", "val")}


def read_idx(path: Path) -> Tensor:
    """The uint8 array of one IDX file.

    Raises:
        UserError: it cannot be read, is no IDX file of bytes, or is shorter or longer than its header says.
    """
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            with gzip.open(plain) if zipped else nullcontext(plain) as file:
                return _read(file, path, path.stat().st_size * (_DEFLATE if zipped else 1))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}", "restore the file; it may be truncated") from None


def _read(file: Any, path: Path, most: int) -> Tensor:
    """As `read_idx`; a file that can hold at most so many bytes is not given memory for more, whatever its header says."""
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8 or not 1 <= head[3] <= 4:
        raise UserError(f"{path} is not an IDX file of bytes: it starts with {head.hex()}", "give MNIST-style files")
    sizes = file.read(4 * head[3])
    shape = [int.from_bytes(sizes[4 * i : 4 * i + 4], "big") for i in range(head[3])]
    wanted = math.prod(shape)
    content = bytearray(file.read(min(wanted, most) + 1))
    if len(content) != wanted or len(sizes) != 4 * head[3]:
        found = f"more than {wanted}" if len(content) > wanted else str(len(content))
        raise UserError(f"{path} is truncated or damaged: its header says {shape}, but it has {found} bytes", "restore the file")
    return torch.frombuffer(content or bytearray(1), dtype=torch.uint8)[:wanted].reshape(shape)


def _find(folder: Path, names: tuple[str, ...], what: str) -> Path | None:
    return next((p for n in names for p in sorted(folder.glob(f"{n}*{what}*")) if p.is_file()), None)


def read_idx_folder(path: str) -> Source:
    """A folder of `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and, if there, `t10k-...` or `valid-...`, plain or `.gz`.

    Raises:
        UserError: files missing or damaged, or pictures and labels that differ in number.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}", "check the path after idx:")
    splits: dict[str, TensorSplit] = {}
    for part, names in _PARTS.items():
        images, labels = _find(folder, names, "images"), _find(folder, names, "labels")
        if images is None or labels is None:
            if images or part == "train":
                raise UserError(f"{folder} has no {names[0]}-{'labels' if images else 'images'}-idx file", "give a MNIST-style folder")
            continue
        x, y = read_idx(images), read_idx(labels)
        if y.ndim != 1 or x.ndim not in (3, 4) or len(x) != len(y):
            raise UserError(f"{images.name} has shape {list(x.shape)} but {labels.name} has {list(y.shape)}", "they must belong together")
        splits[part] = TensorSplit(x[:, None] if x.ndim == 3 else x, y.long())
    return Source(splits["train"], splits.get("test"), splits.get("valid"), images=True)
