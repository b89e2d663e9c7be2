"""What a conversion of fields says at its end: table, headline, the wing's parts of the report page, and the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.evaluation.pictures import picture_quality
from limbeck.report import charts, figures
from limbeck.report.card import provenance
from limbeck.report.page import Section
from limbeck.report.sheets import data_url, enlargement, png
from limbeck.report.tables import ABSENT, duration, human, milliseconds

MEANING = (
    "PSNR and SSIM of whole pictures from held-out cameras against the true ones; worst: the PSNR of the worst view. Time: of optimising, "
    "measurements not counted. Picture: time to render one."
)
SHOWN = 6
"""Views on the sheet."""


@dataclass
class Measured:
    """What was found out about one field.

    Attributes:
        key: its role ("teacher", "baseline", "student", or a name of its own). name: of the method that made it.
        figures: by name, see `limbeck.evaluation.pictures`. cost: parameters, bytes, ms a picture.
        pictures: `(N, 3, H, W)` of the held-out views.
        trace: figures over the steps. seconds, steps: of optimising; None for what went in.
    """

    key: str
    name: str
    figures: dict[str, float]
    cost: dict[str, float]
    pictures: Tensor = field(repr=False)
    trace: list[dict[str, float]] = field(default_factory=list)
    seconds: float | None = None
    steps: int | None = None


def figures_of(pictures: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR and SSIM, see `limbeck.evaluation.pictures.picture_quality`."""
    return picture_quality(pictures, truth)


def _db(value: float) -> str:
    return f"{value:.2f} dB"


def table(rows: Sequence[Measured]) -> dict[str, Any]:
    """Head and rows of the result, for terminal, page and card."""
    head = ["field", "PSNR", "worst", "SSIM", "time", "steps", "parameters", "picture"]
    body = []
    for row in rows:
        f = row.figures
        ssim = f"{f['ssim']:.3f}" if "ssim" in f else ABSENT
        cells = [_db(f["psnr"]), _db(f["worst_psnr"]), ssim, duration(row.seconds), str(row.steps or ABSENT)]
        name = row.name if row.key in ("teacher", "student") else f"by {row.name}"
        cells += [human(row.cost["params"]), milliseconds(row.cost["latency_ms"])]
        body.append({"key": row.key, "name": name, "cells": cells})
    return {"head": head, "rows": body, "text": MEANING}


def reached(trace: Sequence[Mapping[str, float]], aim: float) -> Mapping[str, float] | None:
    """The first point of a curve that is at least so good; None where there is none."""
    return next((point for point in trace if point["psnr"] >= aim), None)


def headline(method: str, rows: Sequence[Measured], equal: str) -> str:
    """What came out, in a sentence or two."""
    by_key = {row.key: row for row in rows}
    student = by_key["student"]
    text = f"The field converted by {method} reaches {_db(student.figures['psnr'])} on held-out views"
    if (baseline := by_key.get("baseline")) is not None:
        gap = student.figures["psnr"] - baseline.figures["psnr"]
        share = f"as many {equal}"
        text += f": {abs(gap):.2f} dB {'more' if gap > 0 else 'less'} than the same field by {baseline.name} in {share} "
        text += f"({_db(baseline.figures['psnr'])})" + ("" if gap > 0 else ", so it did not help here")
        point = reached(student.trace, baseline.figures["psnr"])
        if gap > 0 and point is not None and baseline.seconds:
            text += f"; it was past that after {duration(point['seconds'])} of the other's {duration(baseline.seconds)}"
    text += "."
    if (teacher := by_key.get("teacher")) is not None:
        text += f" Its teacher, with {human(teacher.cost['params'])} parameters instead of {human(student.cost['params'])}, "
        text += f"is at {_db(teacher.figures['psnr'])}."
    return text


def _sheet(columns: Sequence[Tensor], gap: int = 1) -> Tensor:
    """`(3, h, w)`: a row for each of the first views, a column for each of `columns` `(N, 3, H, W)`, white between them."""
    count = min(SHOWN, len(columns[0]))
    _, _, height, width = columns[0].shape
    page = torch.ones(3, count * (height + gap) + gap, len(columns) * (width + gap) + gap)
    for x, pictures in enumerate(columns):
        for y in range(count):
            top, left = gap + y * (height + gap), gap + x * (width + gap)
            page[:, top : top + height, left : left + width] = pictures[y].clamp(0, 1)
    return page


def _pictures(rows: Sequence[Measured], truth: Tensor) -> Section:
    names = ["truth", *(row.name for row in rows)]
    part = Section("views", "Held-out views", text="The first ones of the split; nothing is chosen.")
    page = _sheet([truth, *(row.pictures for row in rows)])
    source = data_url(png(page, enlargement(truth.shape[-1], 96)))
    part.picture(source, "from left to right: " + ", ".join(names), "No pictures.", full=True)
    return part


def _curve(rows: Sequence[Measured]) -> Section:
    part = Section("curve", "PSNR over time")
    series = {row.name: [(point["seconds"], point["psnr"], 0.0) for point in row.trace] for row in rows if row.trace}
    teacher = next((row for row in rows if row.key == "teacher"), None)
    level = None if teacher is None else ("teacher", teacher.figures["psnr"])
    bold = next(row.name for row in rows if row.key == "student")
    drawn = charts.lines(series, "seconds of optimising", "PSNR in dB", bold, level)
    part.picture(drawn, "held-out views, looked at on the way; nothing is chosen by it", "No curve: scene.curve is 0.")
    return part


def sections(rows: Sequence[Measured], truth: Tensor, summary: Mapping[str, Any], log: list[dict[str, Any]]) -> list[Section]:
    """The wing's parts of the page."""
    terms = Section("curves", "The terms of the loss")
    terms.picture(figures.terms(log, "value", summary["main_phase"]), "each term over the steps", "No curve: nothing was optimised.")
    return [_pictures(rows, truth), _curve(rows), terms]


def write_pictures(pictures: Tensor, folder: Path) -> None:
    """The field's held-out views beside its weights, as one sheet."""
    (folder / "views.png").write_bytes(png(_sheet([pictures]), enlargement(pictures.shape[-1], 96)))


def card(summary: Mapping[str, Any]) -> str:
    """Markdown for the README of a field."""
    from limbeck.report.tables import run_markdown

    data = summary["data"]
    lines = [
        f"# {summary['name']}: a radiance field",
        "",
        f"A {summary['student']}, made by `{summary['method']}`. Teacher: {summary['teacher']}. Views: {data['name']} ({data['train']} for "
        f"training, {data['test']} for testing).",
        "",
        summary["headline"],
        "",
        run_markdown(summary),
        "",
        MEANING,
        "",
        "Open it with `limbeck.load_scene(folder)`: called with places and directions `(P, 3)` it gives log-density and colour; "
        "`limbeck.rendering.render_views` draws it. `scene.json` says the cube it lives in.",
        "",
        provenance(summary),
        "",
    ]
    return "\n".join(lines)
