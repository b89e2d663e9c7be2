"""A set of pictures on one sheet: a row for each class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.report.sheets import enlargement, png, sheet

if TYPE_CHECKING:
    from limbeck.condensation.synthetic import SyntheticSet

MOST = 10
"""Pictures of a class that a sheet shows."""


def sheet_png(set: SyntheticSet, side: int = 32) -> bytes:
    """The sheet of a set as a PNG file; small pictures are enlarged without smoothing to at least `side` pixels.

    Transposed for sets of one picture a class, so that the sheet is a row.
    """
    x, y = set.pixels(), set.decode()[1]
    page = sheet(x, y, len(set.classes), MOST)
    if page.shape[1] > 4 * page.shape[2]:  # one or two pictures a class: classes become columns
        page = sheet(x.transpose(2, 3), y, len(set.classes), MOST).transpose(1, 2)
    return png(page, enlargement(x.shape[-1], side))
