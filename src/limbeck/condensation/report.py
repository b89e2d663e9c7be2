"""What a condensation says at its end: table, headline, the wing's parts of the report page, and the set's README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from limbeck.condensation.graphset import GraphSet
from limbeck.condensation.sheet import MOST, sheet_png
from limbeck.report import charts, figures
from limbeck.report.card import provenance
from limbeck.report.page import Section
from limbeck.report.sheets import data_url
from limbeck.report.tables import human, percent

if TYPE_CHECKING:
    from limbeck.condensation.job import Entry
    from limbeck.condensation.problem import Problem
    from limbeck.condensation.scoring import BaseProtocol, Score
    from limbeck.condensation.synthetic import SyntheticSet

CURVE = ("random-real", "k-means", "herding")
"""Selections whose accuracy over the budget is drawn."""

MEANING = (
    "Accuracy on the split that is measured of fresh networks trained on the set alone, mean ± standard deviation over students, after the "
    "last step. Every set gets the same recipe and the same choice of learning rates; real samples get the same soft labels as the set."
)


CARD = (
    "Open it with `limbeck.load_dataset(folder)`: `.torch_dataset()` for torch, `.hf_dataset()` for Hugging Face datasets. Without",
    "limbeck: `set.safetensors` holds the pixels (uint8 with `images.range` = lowest value and step, in units of `mean` and `std` of",
    "`set.json`) and the labels.",
)

GRAPH_CARD = (
    "Open it with `limbeck.load_dataset(folder)`: `.geometric()` gives a list of PyTorch Geometric graphs, `r` the mask of the roots that",
    "are summed. Without limbeck: `set.safetensors` holds node types, the edges of each graph (children to parents in mined trees) and the",
    "classes.",
)


def _cell(score: Score) -> str:
    return f"{100 * score.mean:.1f} ±{100 * score.std:.1f}"


def _ordered(entries: Sequence[Entry]) -> list[Entry]:
    """Whole set first, then baselines, the synthetic set last."""
    rank = {"teacher": 0, "student": 2}
    return sorted(entries, key=lambda entry: rank.get(entry.key, 1))


def table(entries: Sequence[Entry], protocol: BaseProtocol) -> dict[str, Any]:
    """Head and rows of the result, for terminal, page and card."""
    names = list(protocol.architectures)
    head = ["trained on", "samples", "stored", *(f"{name} %" for name in names)]
    rows = []
    for entry in _ordered(entries):
        cells = [str(entry.samples), human(entry.size, "B"), *(_cell(entry.scores[name]) for name in names)]
        name = "synthetic set" if entry.key == "student" else entry.name
        rows.append({"key": entry.key, "name": name, "cells": cells})
    return {"head": head, "rows": rows, "text": MEANING}


def headline(entries: Sequence[Entry], protocol: BaseProtocol) -> str:
    """What came out, in a sentence or two."""
    by_key = {entry.key: entry for entry in entries}
    own, inner = by_key["student"], protocol.inner
    size = own.size
    text = f"{own.samples} samples in {human(size, 'B')} made by {own.name} train a fresh {inner} to {percent(own.scores[inner].mean)}"
    others = [entry for entry in entries if entry.key not in ("student", "teacher")]
    if others:
        best = max(others, key=lambda entry: entry.scores[inner].mean)
        gap = own.scores[inner].mean - best.scores[inner].mean
        way = "more" if gap >= 0 else "less"
        text += f": {100 * abs(gap):.1f} points {way} than {best.name} ({percent(best.scores[inner].mean)}), the best of the baselines"
        text += "" if gap > 0 else ", so it did not help here"
    text += "."
    for name in list(own.scores)[1:]:
        text += f" On {name}, which took no part: {percent(own.scores[name].mean)}"
        if others:
            best = max(others, key=lambda entry: entry.scores[name].mean)
            text += f" ({best.name} {percent(best.scores[name].mean)})"
        text += "."
    if "teacher" in by_key:
        whole = by_key["teacher"]
        times = whole.size / size
        text += f" The whole set is {times:.3g} times as large and gives {percent(whole.scores[inner].mean)}."
    return text


def budget_curve(problem: Problem, protocol: BaseProtocol) -> dict[str, list[list[float]]]:
    """Accuracy of selections of real samples at other budgets, on the inner network: `name -> [[bytes, mean, std], ...]`."""
    import torch

    from limbeck.condensation.selection import herding

    found: dict[str, list[list[float]]] = {name: [] for name in CURVE}
    smallest = min(len(positions) for positions in problem.positions)
    for count in [n for n in problem.condense.budgets if n <= smallest]:
        sets = {
            "random-real": problem.initial("real", count),
            "k-means": problem.initial("kmeans", count),
            "herding": problem.subset(torch.cat([p[herding(problem.at(p), count)] for p in problem.positions])),
        }
        for name, set in sets.items():
            set = set.as_stored()
            score = protocol.score(set)
            found[name].append([set.size(), score.mean, score.std])
    return found


def _pictures(made: SyntheticSet | GraphSet) -> Section:
    part = Section("sheet", "The synthetic samples")
    if isinstance(made, GraphSet):
        sizes = sorted(len(m.graph.types) for m in made.members)
        part.text = f"{len(made)} graphs of {sizes[0]} to {sizes[-1]} nodes, {sum(sizes)} in all."
        return part
    if made.images.ndim != 4 or made.images.shape[1] not in (1, 3):
        part.absent.append("No pictures: the samples are no images.")
        return part
    shown = f"up to {MOST} of each class" if len(made) > MOST * len(made.classes) else "all of them"
    part.picture(data_url(sheet_png(made, 64)), f"as they are stored; {shown}, a row (or column) for each class", "No pictures.", full=True)
    return part


def _storage(entries: Sequence[Entry]) -> Section:
    rows = []
    for entry in _ordered(entries):
        parts = entry.bytes
        cells = [f"{parts.get(name, 0):,}".replace(",", " ") for name in ("images", "labels", "soft labels", "other")]
        name = "synthetic set" if entry.key == "student" else entry.name
        rows.append({"key": "", "name": name, "cells": [*cells, f"{entry.size:,}".replace(",", " ")]})
    head = ["bytes", "samples", "hard labels", "soft labels", "other", "sum"]
    text = "Everything that a student needs is counted: soft labels are not free. Real pictures count one byte a value."
    return Section("storage", "Storage", text=text, head=head, rows=rows)


def _budget(entries: Sequence[Entry], summary: Mapping[str, Any], protocol: BaseProtocol) -> Section:
    part = Section("budget", "Accuracy over the budget")
    inner = protocol.inner
    series = {name: [tuple(point) for point in points] for name, points in (summary.get("budgets") or {}).items()}
    level = None
    for entry in entries:
        score = entry.scores[inner]
        if entry.key == "teacher":
            level = ("the whole set", score.mean)
            continue
        name = entry.name
        series.setdefault(name, [])
        point = (entry.size, score.mean, score.std)
        if all(abs(point[0] - other[0]) > 0 for other in series[name]):
            series[name].append(point)
    own = next(entry.name for entry in entries if entry.key == "student")
    drawn = charts.lines(series, "stored bytes", f"accuracy of {inner}", bold=own, level=level)
    part.picture(drawn, "mean and standard deviation over students", "Not drawn: there is only one set.")
    return part


def _architectures(entries: Sequence[Entry], protocol: BaseProtocol) -> Section:
    part = Section("architectures", "Across architectures")
    names = list(protocol.architectures)
    if len(names) < 2:
        part.absent.append("Not drawn: the set was tried on one architecture (condense.networks names others).")
        return part
    part.text = f"The set was made with {protocol.inner}; the other networks never took part."
    rows = [entry.name for entry in _ordered(entries)]
    values = [[entry.scores[name].mean for name in names] for entry in _ordered(entries)]
    part.picture(charts.heat_map(rows, names, values), "accuracy in percent", "Not drawn.")
    return part


def _robust(summary: Mapping[str, Any]) -> Section:
    own = summary["metrics"]["student"]
    names = {
        "hard_label_accuracy": "accuracy with hard labels",
        "random_accuracy_same_labels": "random real samples, same labels and recipe",
        "hard_label_recovery": "hard-label recovery (whole set minus hard labels; lower is better)",
        "improvement_over_random": "improvement over random",
        "label_robust_score": "label-robust score (0.269 = as random, nothing lost)",
        "augmentation_robust_score": "augmentation-robust score",
    }
    part = Section("robust", "Label- and augmentation-robust scores (DD-Ranking)")
    part.rows = [{"key": "", "name": text, "cells": [f"{own[name]:.4f}"]} for name, text in names.items() if name in own]
    part.head = ["score", "value"] if part.rows else ()
    if not part.rows:
        part.absent.append("Not measured (condense.scores).")
    return part


def sections(
    made: SyntheticSet, entries: Sequence[Entry], summary: Mapping[str, Any], log: list[dict[str, Any]], protocol: BaseProtocol
) -> list[Section]:
    """The wing's parts of the page."""
    curve = Section("curves", "The objective")
    drawn = figures.terms(log, "value", summary["main_phase"])
    curve.picture(drawn, "each term over the outer steps", "No curve: this method optimises nothing.")
    parts = [_pictures(made), _budget(entries, summary, protocol), _architectures(entries, protocol)]
    return [*parts, _storage(entries), _robust(summary), curve]


def card(summary: Mapping[str, Any]) -> str:
    """Markdown for the README of a synthetic set."""
    from limbeck.report.tables import run_markdown

    data = summary["data"]
    lines = [
        f"# {summary['name']}: a condensed data set",
        "",
        f"Method: `{summary['method']}`. Condensed from the training part of {data['name']} ({data['train']} samples, "
        f"{len(data['classes'])} classes).",
        "",
        summary["headline"],
        "",
        run_markdown(summary),
        "",
        MEANING,
        "",
        *(GRAPH_CARD if "graphs" in summary else CARD),
        "",
        provenance(summary),
        "",
    ]
    return "\n".join(lines)
