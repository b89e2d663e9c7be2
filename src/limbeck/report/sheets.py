"""Many small pictures on one sheet, as a PNG file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from torch import Tensor


def sheet(pixels: Tensor, labels: Tensor, classes: int, most: int = 10, gap: int = 1) -> Tensor:
    """`(C, height, width)` in [0, 1]: a row for each class, white between the pictures.

    Args:
        pixels: `(N, C, H, W)`; values outside [0, 1] are clipped.
        labels: `(N,)`.
        classes: rows.
        most: columns at most.
        gap: pixels between two pictures.
    """
    _, channels, height, width = pixels.shape
    columns = min(most, max(int((labels == c).sum()) for c in range(classes)))
    page = torch.ones(channels, classes * (height + gap) + gap, columns * (width + gap) + gap)
    for c in range(classes):
        for column, picture in enumerate(pixels[labels == c][:columns]):
            top, left = gap + c * (height + gap), gap + column * (width + gap)
            page[:, top : top + height, left : left + width] = picture.float().cpu().clamp(0, 1)
    return page


def png(page: Tensor, times: int = 1) -> bytes:
    """A picture `(1 or 3, H, W)` in [0, 1] as a PNG file, each pixel enlarged to `times` squared without smoothing."""
    from PIL import Image

    page = page.clamp(0, 1).repeat_interleave(times, 1).repeat_interleave(times, 2)
    array = (page * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(out, format="PNG", optimize=True)
    return out.getvalue()


def write_each(pictures: Tensor, folder: str | Path) -> None:
    """Every picture of `(N, 1 or 3, H, W)` in [-1, 1] as `00000.png`, `00001.png`, ... in a folder, which is made if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        (folder / f"{number:05d}.png").write_bytes(png((picture + 1) / 2))


def enlargement(width: int, side: int = 32) -> int:
    """How many times a small picture is enlarged to be at least `side` pixels wide."""
    return max(1, -(-side // width))


def data_url(content: bytes) -> str:
    """A PNG file as the source of a page's picture."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
