"""A set of pictures on one sheet: a row for each class."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from limbeck.condensation.synthetic import SyntheticSet

MOST = 10
"""Pictures of a class that a sheet shows."""


def sheet(pixels: Tensor, labels: Tensor, classes: int, most: int = MOST, gap: int = 1) -> Tensor:
    """`(C, height, width)` in [0, 1]: a row for each class, white between the pictures.

    Args:
        pixels: `(N, C, H, W)` in the units of the data; values outside [0, 1] are clipped.
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


def sheet_png(set: SyntheticSet, side: int = 32) -> bytes:
    """The sheet of a set as a PNG file; small pictures are enlarged without smoothing to at least `side` pixels.

    Transposed for sets of one picture a class, so that the sheet is a row.
    """
    from PIL import Image

    x, y = set.pixels(), set.decode()[1]
    page = sheet(x, y, len(set.classes))
    if page.shape[1] > 4 * page.shape[2]:  # one or two pictures a class: classes become columns
        page = sheet(x.transpose(2, 3), y, len(set.classes)).transpose(1, 2)
    times = max(1, -(-side // x.shape[-1]))
    page = page.repeat_interleave(times, 1).repeat_interleave(times, 2)
    array = (page * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(out, format="PNG", optimize=True)
    return out.getvalue()
