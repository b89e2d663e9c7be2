"""What a run of pictures or drawings says at its end: table, headline, sheets, SVG files, curves, README."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import storage
from limbeck.report import charts, figures
from limbeck.report.card import provenance
from limbeck.report.page import Section
from limbeck.report.sheets import data_url, enlargement, png
from limbeck.report.tables import ABSENT, percent, run_markdown
from limbeck.scenes.pictures_judge import Measured
from limbeck.vector import Drawing
from limbeck.vector.simplify import layers_of
from limbeck.vector.svg import to_svg

MEANING = (
    "Class: share of pictures that a classifier of the same data takes for the class they were asked to be of. Density and coverage: "
    "k-nearest-neighbour figures in its features against held-out pictures of these classes, k = 5. Diversity: mean root mean squared "
    "difference of two pictures. Saturated: share of pixels beyond 0.98. The first row measures real training pictures the same way. "
    "Crossing: share of paths that cross themselves; turning: radians beyond one full turn, for each path."
)

LARGEST = 512

COLUMNS = {
    "class": ("class_accuracy", lambda v: percent(v, 1)),
    "density": ("density", lambda v: f"{v:.2f}"),
    "coverage": ("coverage", lambda v: percent(v, 1)),
    "diversity": ("diversity", lambda v: f"{v:.3f}"),
    "saturated": ("saturation", lambda v: percent(v, 1)),
    "modes": ("modes", lambda v: f"{v:.0f}"),
    "crossing": ("self_intersections", lambda v: percent(v, 0)),
    "turning": ("jaggedness", lambda v: f"{v:.2f}"),
}


def table(rows: Sequence[Measured]) -> dict[str, Any]:
    """Head and rows of the result; columns that no row has are left out."""
    shown = {head: column for head, column in COLUMNS.items() if any(column[0] in row.figures for row in rows)}

    def cell(row: Measured, head: str) -> str:
        name, form = shown[head]
        return form(row.figures[name]) if name in row.figures else ABSENT

    body = [{"key": row.key, "name": row.name, "cells": [cell(row, head) for head in shown]} for row in rows]
    return {"head": ["pictures", *shown], "rows": body, "text": MEANING}


def headline(rows: Sequence[Measured]) -> str:
    """What came out, in a sentence or two."""
    own = next(row for row in rows if row.key == "student")
    rival = next((row for row in rows if row.key == "baseline"), None)
    names = [n for n in ("class_accuracy", "coverage", "diversity", "saturation", "self_intersections", "jaggedness") if n in own.figures]
    said = ", ".join(f"{name.replace('_', ' ')} {own.figures[name]:.3g}" for name in names)
    text = f"{own.name}: {said}."
    if rival is not None:
        text += f" {rival.name}: " + ", ".join(f"{n.replace('_', ' ')} {rival.figures[n]:.3g}" for n in names if n in rival.figures) + "."
    return text


def grid_of(pictures: Tensor, columns: int = 10, most: int = 40) -> bytes:
    """A PNG sheet of pictures `(N, C, H, W)` in [-1, 1]."""
    x = (pictures[:most].float() + 1) / 2
    count, channels, height, width = x.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    page = torch.ones(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for number, picture in enumerate(x):
        top, left = 1 + number // columns * (height + 1), 1 + number % columns * (width + 1)
        page[:, top : top + height, left : left + width] = picture.clamp(0, 1)
    return png(page, enlargement(width, 32))


def large_side(drawing: Drawing) -> int:
    """Pixels of a side of the large picture: sixteen times the data's, at most `LARGEST`, for the rasteriser's memory grows with them."""
    return max(drawing.input_shape[1], min(16 * drawing.input_shape[1], LARGEST))


@torch.no_grad()
def svg_of(drawing: Drawing, variant: int, asked: Sequence[str]) -> str:
    """One drawing as an SVG document, titled with the class that was asked for."""
    background = torch.full((drawing.input_shape[0],), drawing.background)
    title = asked[variant] if variant < len(asked) else ""
    return to_svg(layers_of(drawing, variant), drawing.input_shape[1], background, title)


@torch.no_grad()
def write_files(student: nn.Module, asked: Sequence[str], folder: Path) -> None:
    """`pictures.png`, and for drawings `drawing.svg` (further variants: `drawing-1.svg` ...) and `drawing.png`, large."""
    folder = Path(folder)
    device = next(student.parameters()).device
    rng = torch.random.get_rng_state()
    torch.manual_seed(0)  # a generator of views draws its noise
    pick = torch.arange(int(student.variants), device=device)
    (folder / "pictures.png").write_bytes(grid_of(student.render(pick).cpu()))
    torch.random.set_rng_state(rng)
    if isinstance(student, Drawing) and student.input_shape[0] in (1, 3):
        for variant in range(student.variants):
            storage.write_text(folder / ("drawing.svg" if variant == 0 else f"drawing-{variant}.svg"), svg_of(student, variant, asked))
        large = student.render(pick[:1], large_side(student)).cpu()
        (folder / "drawing.png").write_bytes(png((large[0] + 1) / 2))


def _pictures(rows: Sequence[Measured]) -> Section:
    part = Section("pictures", "Pictures", text="In the order of their numbers; nothing is chosen.")
    for row in rows:
        if row.pictures.shape[1] not in (1, 3):
            part.absent.append("No pictures: they have neither 1 nor 3 channels.")
            break
        part.picture(data_url(grid_of(row.pictures)), row.name, "No pictures.")
    return part


@torch.no_grad()
def _drawing(student: nn.Module, asked: Sequence[str]) -> Section:
    part = Section("drawing", "Drawing")
    if not isinstance(student, Drawing) or student.input_shape[0] not in (1, 3):
        return part
    text = svg_of(student, 0, asked)
    part.picture(f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}", "drawing.svg, as a browser draws it", "No SVG.")
    large = student.render(torch.zeros(1, dtype=torch.long, device=student.colour.device), large_side(student))
    part.picture(data_url(png((large[0].detach().cpu() + 1) / 2)), "the same by the soft rasteriser", "No picture.")
    return part


def _curves(traces: Mapping[str, list[dict[str, float]]]) -> Section:
    part = Section("watched", "While it was optimised")
    for name in ("class_accuracy", "coverage", "diversity", "saturation"):
        series = {id: [(row["step"], row[name], 0.0) for row in rows if name in row] for id, rows in traces.items()}
        part.picture(
            charts.lines(series, "steps", name.replace("_", " "), next(iter(traces))), name.replace("_", " "), f"No curve of {name}."
        )
    return part


def sections(
    rows: Sequence[Measured],
    traces: Mapping[str, list[dict[str, float]]],
    student: nn.Module,
    asked: Sequence[str],
    summary: Mapping[str, Any],
    log: list[dict[str, Any]],
) -> list[Section]:
    """The wing's parts of the page."""
    terms = Section("curves", "The terms of the loss")
    terms.picture(figures.terms(log, "value", summary["main_phase"]), "each term over the steps", "No curve: nothing was logged.")
    return [_drawing(student, asked), _pictures(rows), _curves(traces), terms]


def card(summary: Mapping[str, Any]) -> str:
    """Markdown for the README of a scene."""
    lines = [
        f"# {summary['name']}: pictures optimised under a score model",
        "",
        f"Method: `{summary['method']}`. Data: {summary['data']['name']}.",
        "",
        summary["headline"],
        "",
        run_markdown(summary),
        "",
        MEANING,
        "",
        "Open it with `limbeck.scenes.scene.load_scene(folder)`; `render(torch.arange(n))` gives its pictures. A drawing is also in "
        "`drawing.svg`. `limbeck evaluate RUN` measures it again.",
        "",
        provenance(summary),
        "",
    ]
    return "\n".join(lines)
