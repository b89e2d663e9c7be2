"""What a distilled generator says at its end: table, headline, the wing's parts of the report page, and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.report import charts, figures
from limbeck.report.card import provenance
from limbeck.report.page import Section
from limbeck.report.sheets import data_url, enlargement, png, sheet
from limbeck.report.tables import ABSENT, milliseconds, percent
from limbeck.sampling.judge import Measured

MEANING = (
    "Distance: Frechet distance to held-out real pictures in the features of a classifier trained on the same data (no FID: "
    "other features). "
    "Precision and recall: k-nearest-neighbour manifolds, k = 5. Class: share of pictures that this classifier takes for the "
    "class they were "
    "asked to be of. Calls: network evaluations a picture; latency for one picture in batches of 16. The first row measures real "
    "training pictures the same way: the floor."
)


def _number(value: float | None) -> str:
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.3g}"


def table(rows: Sequence[Measured]) -> dict[str, Any]:
    """Head and rows of the result, for terminal, page and card."""
    head = ["model", "calls", "distance", "precision", "recall", "class", "latency"]
    body = []
    for row in rows:
        f = row.figures
        cells = [
            str(row.calls) if row.calls else ABSENT,
            _number(f["feature_distance"]),
            percent(f["precision"], 0),
            percent(f["recall"], 0),
            percent(f.get("class_accuracy"), 1),
            milliseconds(row.latency_ms),
        ]
        body.append({"key": row.key, "name": row.name, "cells": cells})
    return {"head": head, "rows": body, "text": MEANING}


def headline(method: str, rows: Sequence[Measured]) -> str:
    """What came out, in a sentence or two."""
    student = next(row for row in rows if row.key == "student")
    teacher = [row for row in rows if row.key == "teacher"]
    same = [row for row in rows if row.key == "baseline"]
    floor = next(row for row in rows if row.key == "floor")
    own = student.figures["feature_distance"]
    steps = f"{student.calls} network call{'s' if student.calls > 1 else ''}"
    text = f"With {steps} a picture the generator made by {method} is at distance {_number(own)} of real pictures"
    if same:
        before = same[0].figures["feature_distance"]
        text += f"; the teacher in as many steps is at {_number(before)}" + ("" if own < before else ", so it did not help here")
    if teacher:
        best = teacher[-1]
        times = best.latency_ms / student.latency_ms
        text += f", in {best.calls} calls at {_number(best.figures['feature_distance'])}. It is {times:.3g} times as fast as the latter"
    text += f". Real training pictures are at {_number(floor.figures['feature_distance'])}."
    for name, better in (("recall", "recall"), ("class_accuracy", "class accuracy")):
        if teacher and name in student.figures:
            gap = student.figures[name] - teacher[-1].figures[name]
            if gap < -0.05:
                text += f" It lost {-100 * gap:.0f} points of {better}."
    return text


def _grids(rows: Sequence[Measured]) -> Section:
    part = Section("grids", "Pictures", text="The same noise and classes for every model; nothing is chosen.")
    for row in rows:
        if row.pictures is None:
            continue
        x, labels = row.pictures
        if x.shape[1] not in (1, 3):
            part.absent.append("No pictures: they have neither 1 nor 3 channels.")
            break
        page = sheet((x + 1) / 2, labels, int(labels.max()) + 1)
        calls = f"{row.calls} call{'s' if row.calls > 1 else ''}"
        part.picture(data_url(png(page, enlargement(x.shape[-1], 24))), f"{row.name}: {calls}", "No pictures.")
    return part


def _curve(rows: Sequence[Measured]) -> Section:
    part = Section("quality", "Quality over network calls")
    series: dict[str, list[tuple[float, float, float]]] = {"teacher": [], "student": []}
    for row in rows:
        if row.calls:
            side = "student" if row.key.startswith("student") else "teacher"
            series[side].append((row.calls, row.figures["feature_distance"], 0.0))
    floor = next(row.figures["feature_distance"] for row in rows if row.key == "floor")
    drawn = charts.lines(series, "network calls a picture", "distance (log scale)", "student", ("real pictures", floor), log_y=True)
    part.picture(drawn, "Frechet distance in the classifier's features; lower is better", "Not drawn.")
    return part


def _all_figures(rows: Sequence[Measured]) -> Section:
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    body = [{"key": "", "name": row.name, "cells": [_number(row.figures.get(name)) for name in names]} for row in rows]
    text = (
        "nearest: distance to the nearest training picture in units of what held-out pictures have (1: as new as those, 0: "
        "copies); copies: "
        "share nearer to one than 1 % of held-out pictures are."
    )
    return Section("figures", "All figures", text=text, head=["model", *(name.replace("_", " ") for name in names)], rows=body)


def sections(rows: Sequence[Measured], summary: Mapping[str, Any], log: list[dict[str, Any]]) -> list[Section]:
    """The wing's parts of the page."""
    terms = Section("curves", "The terms of the loss")
    terms.picture(figures.terms(log, "value", summary["main_phase"]), "each term over the steps", "No curve: nothing was trained.")
    return [_grids(rows), _curve(rows), _all_figures(rows), terms]


def card(summary: Mapping[str, Any]) -> str:
    """Markdown for the README of a generator."""
    from limbeck.report.tables import run_markdown

    data = summary["data"]
    lines = [
        f"# {summary['name']}: a generator of few steps",
        "",
        f"Method: `{summary['method']}`. Teacher: {summary['teacher']}. Data: the training part of {data['name']} "
        f"({data['train']} pictures, "
        f"{len(data['classes'])} classes).",
        "",
        summary["headline"],
        "",
        run_markdown(summary),
        "",
        MEANING,
        "",
        "Open it with `limbeck.load_generator(folder)` and call `.sample(64, steps=1, seed=0)`, or draw a sheet with "
        "`limbeck sample FOLDER -n 64 --steps 1 --seed 0`. `generator.json` says process, prediction and sampler.",
        "",
        provenance(summary),
        "",
    ]
    return "\n".join(lines)
