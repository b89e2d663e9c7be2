"""Outlines of characters from the DejaVu fonts that come with matplotlib, as closed chains of cubic segments with their Unicode names."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from limbeck.errors import UserError, nearest
from limbeck.vector.bezier import signed_area

MOVE, LINE, QUADRATIC, CUBIC, CLOSE = 1, 2, 3, 4, 79
"""Codes of a matplotlib path."""


@dataclass(frozen=True)
class Outline:
    """The outline of one character in one face.

    Attributes:
        character: what it is. name: its Unicode name. face: the font file's name without its ending.
        chains: closed chains `(3 S, 2)` in float64, S of its own for each; the glyph's bounding box is centred, its longer side is 2.
    """

    character: str
    name: str
    face: str
    chains: tuple[Tensor, ...]


def name_of(character: str) -> str:
    """The Unicode name of a character; its code point where it has none."""
    return unicodedata.name(character, f"U+{ord(character):04X}")


def character_of(prompt: str) -> str:
    """The character that a prompt means: itself, or its Unicode name in any case.

    Raises:
        UserError: neither one character nor a Unicode name; the nearest letter names are offered.
    """
    if len(prompt) == 1:
        return prompt
    try:
        found = unicodedata.lookup(prompt.upper())
    except KeyError:
        known = [unicodedata.name(chr(code)) for code in range(33, 592) if unicodedata.name(chr(code), "")]
        offered = " or ".join(repr(name) for name in nearest(prompt.upper(), known, 2))
        raise UserError(f"{prompt!r} is no character and no Unicode name", f"did you mean {offered}?") from None
    if len(found) != 1:
        raise UserError(f"{prompt!r} names a sequence of characters", "give one character")
    return found


def faces() -> dict[str, Path]:
    """The DejaVu font files by name."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return {path.stem: path for path in sorted(folder.glob("DejaVu*.ttf"))}


def _line(a: Tensor, b: Tensor) -> Tensor:
    """A straight piece as a cubic `(4, 2)`."""
    return torch.stack([a, a + (b - a) / 3, a + (b - a) * 2 / 3, b])


def _raised(a: Tensor, control: Tensor, b: Tensor) -> Tensor:
    """A quadratic as the same curve of degree three."""
    return torch.stack([a, a + (control - a) * 2 / 3, b + (control - b) * 2 / 3, b])


def chains_of(vertices: Tensor, codes: Sequence[int]) -> list[Tensor]:
    """Closed chains `(3 S, 2)` of a matplotlib path; pieces without length and contours without an inside are left out.

    Args:
        vertices: `(N, 2)`. codes: one for each vertex.

    Raises:
        UserError: a code that no path has.
    """
    contours: list[list[Tensor]] = []
    i, here = 0, vertices[0]
    while i < len(codes):
        code, point = int(codes[i]), vertices[i]
        if code == MOVE:
            contours.append([])
            here, i = point, i + 1
        elif code == LINE:
            contours[-1].append(_line(here, point))
            here, i = point, i + 1
        elif code == QUADRATIC:
            contours[-1].append(_raised(here, point, vertices[i + 1]))
            here, i = vertices[i + 1], i + 2
        elif code == CUBIC:
            contours[-1].append(torch.stack([here, point, vertices[i + 1], vertices[i + 2]]))
            here, i = vertices[i + 2], i + 3
        elif code == CLOSE:
            i += 1
        else:
            raise UserError(f"a path with the code {code}", "give a path of matplotlib: move, line, curves of degree 2 and 3, close")
    return [chain for pieces in contours if (chain := _closed(pieces)) is not None]


def _closed(pieces: list[Tensor]) -> Tensor | None:
    if pieces and not torch.equal(pieces[0][0], pieces[-1][3]):
        pieces = [*pieces, _line(pieces[-1][3], pieces[0][0])]
    pieces = [piece for piece in pieces if float((piece[1:] - piece[0]).abs().max()) > 0]
    if len(pieces) < 2:
        return None
    chain = torch.cat([piece[:3] for piece in pieces])
    return chain if abs(float(signed_area(chain))) > 0 else None


def outline_of(character: str, face: str = "DejaVuSans") -> Outline:
    """The outline of a character (or of a Unicode name) in a face.

    Raises:
        UserError: no such face, the face lacks it, or it has no outline (a space).
    """
    from matplotlib.ft2font import FT2Font

    character, known = character_of(character), faces()
    if face not in known:
        raise UserError(f"unknown face {face!r}", f"did you mean {nearest(face, known, 1)[0]!r}?")
    font = FT2Font(str(known[face]))
    if ord(character) not in font.get_charmap():
        raise UserError(f"{face} has no {name_of(character)}", "take a character that the DejaVu fonts have")
    font.set_size(64, 72)
    font.load_char(ord(character), flags=2)  # without hinting
    vertices, codes = font.get_path()
    chains = chains_of(torch.tensor(vertices, dtype=torch.float64), codes.tolist()) if len(codes) else []
    if not chains:
        raise UserError(f"{name_of(character)} has no outline in {face}", "take a character that leaves ink")
    points = torch.cat(chains)
    low, high = points.amin(0), points.amax(0)
    half = (high - low).max() / 2
    return Outline(character, name_of(character), face, tuple((chain - (low + high) / 2) / half for chain in chains))


def glyph_outlines(characters: Iterable[str], within: Iterable[str] | None = None) -> list[Outline]:
    """The outlines of characters in every DejaVu face that has them (or in the faces named `within`), face by face.

    Raises:
        UserError: no face has an outline of any of them.
    """
    found, chosen = [], list(characters)
    for face in faces() if within is None else within:
        for character in chosen:
            try:
                found.append(outline_of(character, face))
            except UserError as error:
                if within is not None and "unknown face" in error.message:
                    raise
    if not found:
        raise UserError("none of the characters has an outline", "ask for letters, digits and common signs")
    return found
