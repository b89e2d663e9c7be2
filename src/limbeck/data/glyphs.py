"""Pictures of characters, drawn from the DejaVu fonts that come with matplotlib: real shapes, on every machine."""

from __future__ import annotations

import string
import unicodedata
from pathlib import Path

import torch

from limbeck.data.choose import generator
from limbeck.data.source import Source
from limbeck.data.split import TensorSplit
from limbeck.errors import UserError

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase + string.punctuation
"""The 94 printable ASCII characters; the first 62 are digits and letters."""


def faces(characters: str) -> list[Path]:
    """The DejaVu faces of matplotlib that have all of the characters, sorted by file name.

    Raises:
        UserError: no face has them all.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = [p for p in sorted(folder.glob("DejaVu*.ttf")) if set(map(ord, characters)) <= FT2Font(str(p)).get_charmap().keys()]
    if not found:
        raise UserError("no DejaVu face has all of the characters asked for", "ask for letters, digits and common signs")
    return found


def render(size: int = 16, characters: str | None = None, classes: int = 62, jitters: int = 8) -> Source:
    """Every character in every face, each `jitters` times at a size and place of its own, `(1, size, size)` in uint8.

    A (face, jitter) pair is either for training or for testing (one in four), with all characters of that pair; so no
    test picture was drawn the way a training picture was.

    Args:
        size: height and width in pixels.
        characters: one class each; None takes the first `classes` of `CHARACTERS`.
        classes: how many characters when none are given, 2 to 94.
        jitters: how many sizes and places for each face.

    Raises:
        UserError: repeated characters, too few or too many of them, or sizes out of range.
    """
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    if characters is None:
        if not 2 <= classes <= len(CHARACTERS):
            raise UserError(f"glyphs with {classes} classes", f"ask for 2 to {len(CHARACTERS)}, or give the characters themselves")
        characters = CHARACTERS[:classes]
    if len(set(characters)) != len(characters) or len(characters) < 2:
        raise UserError("glyphs needs at least two characters, each once", "remove the repeated ones")
    if not 6 <= size <= 256 or jitters < 2:
        raise UserError(f"glyphs with size={size} and jitters={jitters}", "give a size of 6 to 256 and at least 2 jitters")
    fonts = faces(characters)
    source = generator(len(fonts), jitters)
    fine = 4 * size
    parts: dict[bool, list[numpy.ndarray]] = {True: [], False: []}
    order = torch.randperm(len(fonts) * jitters, generator=source).tolist()
    held_out = set(order[: max(1, len(order) // 4)])
    for number in range(len(fonts) * jitters):
        scale, right, down, turn = torch.rand(4, generator=source).tolist()
        font = ImageFont.truetype(str(fonts[number // jitters]), round(fine * (0.62 + 0.23 * scale)))
        at = fine * (0.5 + 0.16 * (right - 0.5)), fine * (0.72 + 0.12 * (down - 0.5))
        for character in characters:
            # Drawn four times as large, then averaged: edges get their grey.
            picture = Image.new("L", (fine, fine))
            ImageDraw.Draw(picture).text(at, character, fill=255, font=font, anchor="ms")
            picture = picture.rotate(16 * (turn - 0.5), Image.Resampling.BILINEAR)
            parts[number in held_out].append(numpy.asarray(picture.reduce(4)))

    def split(pictures: list[numpy.ndarray]) -> TensorSplit:
        labels = torch.arange(len(characters)).repeat(len(pictures) // len(characters))
        return TensorSplit(torch.from_numpy(numpy.stack(pictures))[:, None], labels)

    names = tuple(unicodedata.name(c, f"U+{ord(c):04X}") for c in characters)
    return Source(split(parts[False]), split(parts[True]), classes=names, images=True)
