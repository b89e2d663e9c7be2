"""Folders of pictures, one subfolder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from limbeck.data.source import IN_MEMORY, Source
from limbeck.data.split import DatasetSplit, Split, TensorSplit
from limbeck.errors import UserError, nearest
from limbeck.places import user_path

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_PARTS = {"train": ("train",), "test": ("test",), "valid": ("valid", "val", "validation")}


def picture(image: Any, size: int | None, channels: int) -> Tensor:
    """A Pillow image as `(channels, H, W)` uint8, scaled to `size` x `size` if given."""
    import numpy
    from PIL import Image

    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(numpy.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def check_channels(channels: int | None, size: int | None) -> None:
    """Refuse other than 1 or 3 channels and sizes below 1.

    Raises:
        UserError: naming the argument.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}", "give 1 (grey) or 3 (colour)")
    if size is not None and size < 1:
        raise UserError(f"size is {size}", "give the side of the pictures in pixels")


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable picture: {error}", "restore or remove the file; it may be truncated") from None


class Pictures(Dataset):
    """Files as `((C, H, W) float in [0, 1], class number)`, opened when asked for.

    Args:
        files: paths with their class numbers.
        size, channels: as for `picture`.

    Raises:
        UserError: (on access) a file that is no picture, or a picture of another size than the first.
    """

    def __init__(self, files: list[tuple[Path, int]], size: int | None, channels: int) -> None:
        self.files, self.size, self.channels = files, size, channels
        self.targets = [number for _, number in files]
        self.shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, index: int) -> Tensor:
        """`(C, H, W)` uint8 of one file."""
        path = self.files[index][0]
        found = picture(_opened(path), self.size, self.channels)
        if self.shape is None:
            self.shape = tuple(found.shape)
        if tuple(found.shape) != self.shape:
            sides = " and ".join(f"{w} x {h}" for _, h, w in (self.shape, found.shape))
            raise UserError(f"pictures differ in size: {sides} ({path})", "give size= to scale them alike")
        return found

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels(index).float().div_(255), self.files[index][1]


def _split(files: list[tuple[Path, int]], size: int | None, channels: int) -> Split:
    pictures = Pictures(files, size, channels)
    if files and pictures.pixels(0).numel() * len(files) > IN_MEMORY:
        return DatasetSplit(pictures)
    pixels = torch.stack([pictures.pixels(i) for i in range(len(files))]) if files else torch.zeros(0, channels, 1, 1)
    return TensorSplit(pixels, torch.tensor(pictures.targets, dtype=torch.long))


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_folder(path: str, size: int | None = None, channels: int | None = None) -> Source:
    """Pictures in `<class>/`, or in `train/<class>/`, `test/<class>/` and `valid/<class>/`.

    Args:
        path: the folder.
        size: side in pixels to scale to; None when all have the same size already.
        channels: 1 or 3; None takes 1 when the first picture is grey, else 3.

    Raises:
        UserError: no such folder, no pictures, an unreadable one, different sizes, or a test class that training lacks.
    """
    folder = user_path(path)
    check_channels(channels, size)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}", "check the path after folder:")
    roots = {part: next((folder / n for n in names if (folder / n).is_dir()), None) for part, names in _PARTS.items()}
    if roots["train"] is None:
        roots = {"train": folder}
    classes = _classes(roots["train"])  # type: ignore[arg-type]
    if not classes:
        raise UserError(f"{roots['train']} has no class folders", "put the pictures into one subfolder for each class")
    splits: dict[str, Split] = {}
    for part, root in roots.items():
        if root is None:
            continue
        strange = [c for c in _classes(root) if c not in classes]
        if strange:
            offer = " or ".join(map(repr, nearest(strange[0], classes)))
            raise UserError(f"{root} has the class {strange[0]!r}, which {roots['train']} lacks", f"did you mean {offer}?")
        files = [
            (p, number)
            for number, name in enumerate(classes)
            if (root / name).is_dir()
            for p in sorted((root / name).rglob("*"))
            if p.suffix.lower() in _SUFFIXES and p.is_file()
        ]
        if not files:
            raise UserError(f"{root} holds no pictures", f"pictures end in {', '.join(sorted(_SUFFIXES))}")
        if channels is None:
            channels = 1 if _opened(files[0][0]).mode in ("1", "L", "I;16") else 3
        splits[part] = _split(files, size, channels)
    note = [size, channels]
    return Source(splits["train"], splits.get("test"), splits.get("valid"), tuple(classes), images=True, note=note)
