"""What a run of the structure wing shows: a row for every stage with and without the teacher, and the front of quality over cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.evaluation.front import front
from limbeck.evaluation.statistics import higher_is_better
from limbeck.report import charts
from limbeck.report.page import Section
from limbeck.report.tables import figure, human, milliseconds

SLACK = 0.02
"""How much more than its budget a student may use before it is said: latencies are never measured twice alike."""

COSTS = {"params": "parameters", "flops": "FLOPs of one sample", "bytes": "bytes on disk", "latency_ms": "latency in ms"}


@dataclass(frozen=True)
class Row:
    """One model of the table: its role in the summary, its name, its figures and its cost."""

    key: str
    name: str
    metrics: Mapping[str, float]
    cost: Mapping[str, Any]


def rows(summary: Mapping[str, Any], stages: Sequence[str]) -> list[Row]:
    """Every model of a run in the order of the stages; those that were not measured are left out."""
    last = stages[-1] if len(stages) > 1 else ""
    named = {"teacher": "teacher"}
    for stage in stages if last else ():
        named[f"{stage} made"] = f"{stage}: untrained"
        named["baseline" if stage == last else f"{stage} alone"] = f"{stage}: without distillation"
        named["student" if stage == last else stage] = f"{stage}: distilled"
    if not last:
        named |= {"made": "as made, untrained", "baseline": "without distillation", "student": "distilled"}
    metrics, costs = summary["metrics"], summary["cost"]
    return [Row(key, name, metrics[key], costs.get(key, {})) for key, name in named.items() if key in metrics]


def table(summary: Mapping[str, Any], found: Sequence[Row]) -> dict[str, Any]:
    """Head and rows of the run's table."""
    metric = summary["primary"]
    head = ["model", metric.replace("_", " "), "parameters", "FLOPs", "latency", "size on disk"]
    body = [
        {
            "key": row.key if row.key in ("teacher", "baseline", "student") else "",
            "name": row.name,
            "cells": [
                figure(metric, row.metrics.get(metric)),
                human(row.cost.get("params")),
                human(row.cost.get("flops"), "FLOP"),
                milliseconds(row.cost.get("latency_ms")),
                human(row.cost.get("bytes"), "B"),
            ],
        }
        for row in found
    ]
    text = (
        "Measured on the test split after the last step. Without distillation: the same structure, steps and settings, with labels alone. "
        "Untrained: right after it was made. FLOPs are those of matrix products and convolutions, whatever the number of bits."
    )
    return {"head": head, "rows": body, "text": text}


def headline(summary: Mapping[str, Any], found: Sequence[Row]) -> str:
    """What came out, in a sentence or two."""
    metric, by_key = summary["primary"], {row.key: row for row in found}
    own = by_key["student"]
    made = ", then ".join(summary.get("methods") or [summary["method"]])
    text = f"Made with {made}, the student reaches {figure(metric, own.metrics[metric])} {metric.replace('_', ' ')}"
    if "baseline" in by_key:
        alone = by_key["baseline"].metrics[metric]
        better = (own.metrics[metric] > alone) == higher_is_better(metric)
        same = figure(metric, alone) == figure(metric, own.metrics[metric])
        text += f" with its teacher and {figure(metric, alone)} without" + ("" if better or same else ", so the teacher did not help here")
    text += "."
    if "teacher" in by_key and own.cost:
        big = by_key["teacher"]
        times = [
            f"{big.cost[name] / own.cost[name]:.3g} times {told}"
            for name, told in (("params", "the parameters"), ("flops", "the FLOPs"), ("bytes", "the bytes"))
            if own.cost.get(name) and big.cost.get(name)
        ]
        text += f" The teacher reaches {figure(metric, big.metrics[metric])} with {', '.join(times)}."
    return text


def sections(found: Sequence[Row], summary: Mapping[str, Any], log: list[dict[str, Any]]) -> list[Section]:
    """The front of quality over each cost, and what the budget bought."""
    metric = summary["primary"]
    part = Section("front", "Quality over cost")
    for name, title in COSTS.items():
        shown = [row for row in found if row.cost.get(name) and metric in row.metrics]
        points = [(float(row.cost[name]), float(row.metrics[metric])) for row in shown]
        best = front(points, (False, higher_is_better(metric)))
        drawn = charts.front([row.name for row in shown], points, best, title, metric.replace("_", " "))
        told = f"{metric.replace('_', ' ')} over {title}; the line joins what no other model beats"
        part.picture(drawn, told, f"No {title} was measured.")
    budget = summary.get("budget")
    if not budget:
        return [part]
    lines = [
        {"key": "", "name": COSTS.get(name, name), "cells": [f"{limit:.6g}", f"{100 * budget['used'][name]:.1f} %"]}
        for name, limit in budget["limits"].items()
    ]
    return [Section("budget", "Budget", head=["limit", "at most", "used"], rows=lines), part]
