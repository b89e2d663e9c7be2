"""What a run on texts shows and keeps: its table, its page, and a student's folder that opens with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from limbeck.outcome import Artifact, Outcome
from limbeck.report.tables import NAMES, figure, human, milliseconds, percent

if TYPE_CHECKING:
    from limbeck.data import Data
    from limbeck.report.page import Section
    from limbeck.tasks import Measured, Task

COLUMNS = {
    "language": (
        ("nll", "nats"),
        ("perplexity", "perplexity"),
        ("bits_per_byte", "bits/byte"),
        ("rouge_l", "ROUGE-L"),
        ("exact_match", "exact"),
    ),
    "embedding": (("mrr", "MRR"), ("recall@1", "recall@1"), ("recall@10", "recall@10"), ("ndcg@10", "nDCG@10")),
}
"""Metrics in the table, and what their columns are called; those that were not measured are left out."""

UNITS = {"nll": "nats a token", "mrr": "MRR"}


class TextStudent(Artifact):
    """A student and its tokenizer in one folder, which transformers opens alone.

    Args:
        network: the student.
        tokenizer: of transformers.
    """

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        self.network, self.tokenizer = network, tokenizer

    @property
    def held(self) -> nn.Module:
        """The network."""
        return self.network

    def save(self, folder: str | Path, card: str = "", extra: dict[str, Any] | None = None) -> None:
        """Write the network as `limbeck.zoo.save_model` does, and the tokenizer beside it."""
        from limbeck.zoo import save_model

        self.tokenizer.save_pretrained(folder)
        save_model(self.network, folder, card=card, extra=extra)


def _cell(name: str, value: float | None) -> str:
    if name in ("rouge_l", "exact_match") or name.startswith("recall"):
        return percent(value)
    return figure(name, value)


def table(summary: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Head and rows of the run's table."""
    metrics, costs, near = summary["metrics"], summary["cost"], summary.get("to_teacher", {})
    columns = [(name, title) for name, title in COLUMNS[family] if any(name in row for row in metrics.values())]
    head = ["model", *(title for _, title in columns)]
    if near:
        head.append("accepted")
    fast = any("texts_per_second" in cost for cost in costs.values())
    head += ["parameters", "texts/s" if fast else "latency", "size"]
    rows = []
    for role, title in NAMES.items():
        if role not in metrics:
            continue
        cost = costs.get(role) or (costs.get("student") if role == "baseline" else None) or {}
        cells = [_cell(name, metrics[role].get(name)) for name, _ in columns]
        if near:
            cells.append(percent(near.get(role, {}).get("acceptance")))
        speed = human(cost.get("texts_per_second")) if fast else milliseconds(cost.get("latency_ms"))
        cells += [human(cost.get("params")), speed, human(cost.get("bytes"), "B")]
        rows.append({"key": role, "name": title, "cells": cells})
    return {"head": head, "rows": rows}


def headline(summary: Mapping[str, Any], task: Task) -> str:
    """What came out, in a sentence or two."""
    metrics, name, costs = summary["metrics"], task.primary, summary["cost"]
    unit, own = UNITS.get(name, name), metrics["student"][name]
    text = f"Distilled with {summary['method']}, the student reaches {own:.3f} {unit}"
    if "baseline" in metrics:
        alone = metrics["baseline"][name]
        better = (own > alone) if task.higher_is_better else (own < alone)
        if round(abs(own - alone), 3):
            text += f": {abs(own - alone):.3f} {'better' if better else 'worse'} than the same student trained alone ({alone:.3f})"
            text += "" if better else ", so it did not help here"
        else:
            text += f", the same as the student trained alone ({alone:.3f})"
    text += "."
    if "teacher" in metrics and "teacher" in costs:
        times = costs["teacher"]["params"] / max(costs["student"]["params"], 1)
        faster = costs["teacher"]["latency_ms"] / max(costs["student"]["latency_ms"], 1e-9)
        if "texts_per_second" in costs["teacher"]:  # in batches
            faster = costs["student"]["texts_per_second"] / costs["teacher"]["texts_per_second"]
        reached = f"reaches {metrics['teacher'][name]:.3f}"
        if "teacher" in summary.get("notes", {}):  # it reads other tokens, and figures a token do not compare
            per_byte = [metrics[role].get("bits_per_byte") for role in ("teacher", "student")]
            known = all(value is not None for value in per_byte)
            reached = f"has other tokens ({per_byte[0]:.3f} bits a byte, the student {per_byte[1]:.3f})" if known else "has other tokens"
        text += f" The teacher {reached}, {times:.1f} times the parameters and {faster:.1f} times the time."
    near = summary.get("to_teacher", {}).get("student")
    if near:
        text += f" The teacher would accept {percent(near['acceptance'])} of the student's tokens."
    return text


def sections(summary: Mapping[str, Any], log: list[dict[str, Any]], measured: Mapping[str, Measured]) -> list[Section]:
    """The page's own parts: every figure, training curves, and what was written."""
    from limbeck.report import figures
    from limbeck.report.page import Section

    metrics = summary["metrics"]
    roles = [role for role in NAMES if role in metrics]
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    head = ["figure", *(NAMES[role] for role in roles)]
    rows = [{"key": name, "name": name, "cells": [figure(name, metrics[role].get(name)) for role in roles]} for name in names]
    for role, near in summary.get("to_teacher", {}).items():
        rows += [
            {
                "key": f"{role}-{name}",
                "name": f"{name} with the teacher",
                "cells": [figure(name, value) if other == role else "" for other in roles],
            }
            for name, value in near.items()
        ]
    found = [Section("figures", "All figures", head=head, rows=rows)]
    curves = Section("curves", "Training")
    drawn = figures.terms(log, "value", summary["main_phase"])
    curves.picture(drawn, "Each term of the loss over the steps.", "No training curve: the log is empty.", full=True)
    found.append(curves)
    for role, said in measured.items():
        if said.texts:
            text = "\n\n".join(f"PROMPT\n{t['prompt']}\nREFERENCE\n{t['reference']}\nWRITTEN\n{t['written']}" for t in said.texts)
            found.append(Section(f"texts-{role}", f"What the {NAMES[role]} writes", code=text))
    return found


def text_outcome(
    student: nn.Module, summary: dict[str, Any], measured: Mapping[str, Measured], task: Task, data: Data, phase: str
) -> Outcome:
    """The outcome of a run on texts; `phase` is the one whose curves are shown."""
    summary["table"] = table(summary, task.family)
    summary["headline"] = headline(summary, task)
    summary["main_phase"] = phase
    assert data.text is not None
    return Outcome(
        {"student": TextStudent(student, data.text.tokenizer)},
        summary,
        sections=lambda whole, log: sections(whole, log, measured),
    )
