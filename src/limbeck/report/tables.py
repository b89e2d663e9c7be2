"""The table at the end of a run: one set of rows for the terminal, the page and Markdown, in units that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {
    "teacher": "teacher",
    "baseline": "student alone",
    "student": "distilled student",
    "ceiling": "ceiling: all labels",
}
"""The models of a run, in the order of the table, and what people call them."""

ABSENT = "–"


def human(value: float | None, unit: str = "") -> str:
    """A count with three digits: 3.7k, 113k, 1.2 MFLOP, 15.2 kB. Powers of 1000; ABSENT for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return ABSENT
    size = abs(float(value))
    prefix = ""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if size < 999.5 or prefix == "P":
            break
        size /= 1000
    digits = f"{size:.0f}" if size >= 99.95 or (not prefix and size == int(size)) else f"{size:.1f}"
    sign = "-" if value < 0 else ""
    return f"{sign}{digits} {prefix}{unit}" if unit else f"{sign}{digits}{prefix}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent."""
    return ABSENT if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    """A time in ms or, below 1 ms, in µs."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{1000 * value:.0f} µs" if value < 1 else f"{value:.3g} ms"


def duration(seconds: float | None) -> str:
    """A time as 12.3 s, 4 min 05 s or 1 h 02 min."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def main_metric(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The figure that a run is about: accuracy where there is one, else the first."""
    names = list(dict.fromkeys(name for row in metrics.values() for name in row or {}))
    return "accuracy" if "accuracy" in names or not names else names[0]


def figure(name: str, value: float | None) -> str:
    """A metric as text: percent for accuracies and calibration errors, three digits for the rest."""
    if value is None or not math.isfinite(value):
        return ABSENT
    share = "accuracy" in name or name in ("ece", "adaptive_ece", "top1", "f1")
    return percent(value) if share else f"{value:.3g}"


def run_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Column titles and rows of a run's table.

    Args:
        summary: what summary.json holds. The student alone and the ceiling have the student's architecture, so its cost is shown
            for them where they bring none of their own.

    Returns:
        The titles, and per model `{"key", "name", "cells"}` with as many cells as there are titles after the first.
    """
    if "table" in summary:  # a wing with a table of its own
        return list(summary["table"]["head"]), list(summary["table"]["rows"])
    metrics: Mapping[str, Any] = summary.get("metrics") or {}
    costs: Mapping[str, Any] = summary.get("cost") or {}
    metric = main_metric(metrics)
    titles = ["model", metric.replace("_", " "), "calibration error", "parameters", "FLOPs", "latency", "size on disk"]
    rows = []
    for key, name in NAMES.items():
        if not metrics.get(key):
            continue
        cost = costs.get(key) or (costs.get("student") if key in ("baseline", "ceiling") else None) or {}
        cells = [
            figure(metric, metrics[key].get(metric)),
            figure("ece", metrics[key].get("ece")),
            human(cost.get("params")),
            human(cost.get("flops"), "FLOP"),
            milliseconds(cost.get("latency_ms")),
            human(cost.get("bytes"), "B"),
        ]
        rows.append({"key": key, "name": name, "cells": cells})
    return titles, rows


def gain(summary: Mapping[str, Any]) -> float | None:
    """Distilled student minus student alone, in the run's main metric; None when one of them is missing."""
    metrics = summary.get("metrics") or {}
    metric = main_metric(metrics)
    pair = [(metrics.get(key) or {}).get(metric) for key in ("student", "baseline")]
    return None if None in pair else pair[0] - pair[1]


def headline(summary: Mapping[str, Any]) -> str:
    """What came out, in a sentence or two of plain text."""
    from limbeck.evaluation.statistics import higher_is_better

    if "headline" in summary:  # a wing that speaks for itself
        return str(summary["headline"])
    metrics, costs = summary.get("metrics") or {}, summary.get("cost") or {}
    metric = main_metric(metrics)
    student = (metrics.get("student") or {}).get(metric)
    if student is None:
        return f"Distilled with {summary.get('method', 'an unnamed method')}; no figures were measured."
    text = f"Distilled with {summary.get('method', '?')}, the student reaches {figure(metric, student)} {metric.replace('_', ' ')}"
    difference = gain(summary)
    if difference is not None:
        alone = figure(metric, metrics["baseline"][metric])
        in_percent = figure(metric, difference).endswith("%")
        step = f"{100 * abs(difference):.1f} points" if in_percent else f"{abs(difference):.3g}"
        if difference == 0:
            text += f", the same as the student trained alone ({alone})"
        else:
            better = (difference > 0) == higher_is_better(metric)
            way = "more" if difference > 0 else "less"
            text += f": {step} {way} than the same student trained alone ({alone})" + ("" if better else ", so it did not help here")
    text += "."
    sizes = [(costs.get(key) or {}).get("params") for key in ("teacher", "student")]
    if all(sizes) and sizes[0] > sizes[1]:
        teacher = (metrics.get("teacher") or {}).get(metric)
        reach = f" and {figure(metric, teacher)}" if teacher is not None else ""
        text += f" The teacher has {sizes[0] / sizes[1]:.3g} times its parameters{reach}."
    return text


def run_table(summary: Mapping[str, Any]) -> Table:
    """The run's table for the terminal (`rich.print(run_table(summary))`)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    titles, rows = run_rows(summary)
    narrow = {"calibration error": "calib.\nerror", "size on disk": "size on\ndisk"}  # the table should fit 80 columns
    narrow |= {"perplexity": "per-\nplexity", "bits/byte": "bits/\nbyte"}
    if "FLOPs" not in titles:
        narrow["parameters"] = "para-\nmeters"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for i, title in enumerate(titles):
        table.add_column(Text(narrow.get(title) or printable(title)), justify="right" if i else "left", no_wrap=True)
    styles = {"student": "bold green", "ceiling": "dim"}
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in (row["name"], *row["cells"])), style=styles.get(row["key"]))
    return table


_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`[]<>|&"})


def plain_markdown(value: Any) -> Any:
    """Plain data whose texts mean nothing but themselves in Markdown: one line each, no link, no picture, no HTML, no table, no code."""
    if isinstance(value, str):
        return printable(value).translate(_MARKS)
    if isinstance(value, Mapping):
        return {plain_markdown(key): plain_markdown(item) for key, item in value.items()}
    return [plain_markdown(item) for item in value] if isinstance(value, (list, tuple)) else value


def run_markdown(summary: Mapping[str, Any]) -> str:
    """The run's table in Markdown."""
    titles, rows = run_rows(summary)
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join([*lines, *("| " + " | ".join([row["name"], *row["cells"]]) + " |" for row in rows)]) + "\n"
