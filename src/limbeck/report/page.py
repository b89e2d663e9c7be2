"""The self-contained page of a run or a comparison: one HTML file, no script, no address outside it.

Text reaches the page through jinja2 with escaping on; pictures are embedded; a Content-Security-Policy forbids everything else.
A part that cannot be shown is replaced by a line that says why.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck import storage
from limbeck.errors import visible
from limbeck.report import figures, tables

if TYPE_CHECKING:
    from limbeck.evaluation.comparison import Comparison


@dataclass
class Report:
    """All that a run's page shows; whatever is missing is said to be missing.

    Attributes:
        title: name of the run.
        summary: what summary.json holds.
        log: the lines of log.jsonl.
        logits: "teacher", "baseline", "student", "ceiling" -> `(N, C)` on the test split.
        labels: `(N,)` true classes of the test split, -1 where unknown.
        inputs: `(N, C, H, W)` images of the test split in any value range, or None.
        classes: names of the classes.
        recipe_yaml: the resolved recipe.
        own: parts of a wing of its own, shown after the table in place of those of a classifier; None for these.
        more: parts of a wing that come before those.
    """

    title: str
    summary: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    logits: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    inputs: Tensor | None = None
    classes: tuple[str, ...] = ()
    recipe_yaml: str = ""
    own: list[Section] | None = None
    more: list[Section] = field(default_factory=list)


@dataclass
class Section:
    """One part of a page; parts that are empty are not drawn."""

    id: str
    title: str
    text: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    alarms: Sequence[str] = ()
    pictures: list[dict[str, str]] = field(default_factory=list)
    facts: Sequence[tuple[str, Any]] = ()
    code: str = ""
    absent: list[str] = field(default_factory=list)

    def picture(self, source: str, caption: str, otherwise: str, full: bool = False) -> None:
        """Add a picture, or the line that says why there is none."""
        if source:
            self.pictures.append({"source": source, "caption": caption, "class": "full" if full else ""})
        else:
            self.absent.append(otherwise)


def _table(report: Report) -> Section:
    titles, rows = tables.run_rows(report.summary)
    part = Section("table", "Result", head=titles if rows else (), rows=rows)
    usual = "Measured on the test split after the last step, never on the best one. Calibration error is the expected one (ECE)."
    part.text = (report.summary.get("table") or {}).get("text", usual)
    if not rows:
        part.text, part.absent = "", ["No table: the run recorded no metrics."]
    return part


def _ceiling(report: Report) -> Section:
    part = Section("ceiling", "What the ceiling row means")
    if not (report.summary.get("metrics") or {}).get("ceiling"):
        part.absent.append("This run trained no ceiling: the same student with every label.")
        return part
    note = (report.summary.get("notes") or {}).get("ceiling")
    part.text = note or (
        "The ceiling is the same student trained with the labels of all training samples. The other two students did not have them: "
        "it marks what the labels that the teacher stands in for would have been worth, and is no competitor."
    )
    return part


def _curves(report: Report) -> Section:
    metric = tables.main_metric(report.summary.get("metrics") or {})
    part = Section("curves", "Curves")
    drawn = figures.metric_curves(report.log, metric)
    part.picture(drawn, f"{metric} while training", f"No curve of {metric}: the log has no metrics between steps.")
    part.picture(figures.terms(report.log, "value"), "each loss term of the student", "No curve of the loss: the log has no loss terms.")
    return part


def _name(report: Report, number: int) -> str:
    return str(report.classes[number]) if 0 <= number < len(report.classes) else "unknown" if number < 0 else str(number)


def _classifies(logits: Tensor, labels: Tensor | None) -> bool:
    """Whether the outputs are one row of class scores per sample, with single labels where there are any."""
    return logits.ndim == 2 and logits.shape[1] > 1 and (labels is None or (labels.ndim == 1 and len(labels) == len(logits)))


def _disagreement(report: Report) -> Section:
    from limbeck.evaluation.agreement import agreement, disagreements

    part = Section("disagreement", "Where student and teacher disagree")
    student, teacher, labels = report.logits.get("student"), report.logits.get("teacher"), report.labels
    if student is None or teacher is None or not _classifies(student, labels) or student.shape != teacher.shape:
        part.absent.append("Not shown: it needs the class outputs of both student and teacher on the test split.")
        return part
    facts = agreement(student, teacher)
    where = disagreements(student, teacher, labels, None)
    part.text = (
        f"They name the same class for {tables.percent(facts['top1'])} of {len(student)} test samples "
        f"({len(where)} differ); mean KL(teacher || student) is {facts['kl']:.3f} nats, Jensen-Shannon {facts['js']:.3f} nats."
    )
    s, t = student.argmax(-1), teacher.argmax(-1)
    if labels is not None and len(where):
        known = where[labels[where] >= 0]
        right_t, right_s = int((t[known] == labels[known]).sum()), int((s[known] == labels[known]).sum())
        part.text += f" Where they differ and the truth is known, the teacher is right {right_t} times and the student {right_s} times."
    first = where[:24]
    if not len(first):
        part.absent.append("No pictures: student and teacher agree on every test sample.")
    elif report.inputs is None or report.inputs.ndim != 4:
        part.absent.append("No pictures: the inputs of this run are not images.")
    else:
        truth = [_name(report, int(labels[i])) if labels is not None else "unknown" for i in first]
        captions = [f"true {true}\nteacher {_name(report, int(t[i]))}\nstudent {_name(report, int(s[i]))}" for true, i in zip(truth, first)]
        part.picture(figures.gallery(report.inputs, first, captions), "the most confident disagreements first", "No pictures.", full=True)
    if labels is not None:
        drawn = figures.confusion(student, labels, report.classes)
        part.picture(drawn, "confusion of the student", "No confusion table: no known labels, or more than 30 classes.")
    return part


def _reliability(report: Report) -> Section:
    part = Section("reliability", "Reliability")
    usable = {} if report.labels is None else {k: v for k, v in report.logits.items() if _classifies(v, report.labels)}
    if report.labels is None or not usable:
        part.absent.append("Not shown: it needs class outputs and labels of the test split.")
        return part
    part.text = "How often a model is right when it is so sure. On the dotted line, confidence can be taken at its word."
    part.picture(figures.reliability(usable, report.labels), "ten bins of equal width", "Not shown: no test sample has a label.", full=True)
    return part


def _cost(report: Report) -> Section:
    metric = tables.main_metric(report.summary.get("metrics") or {})
    part = Section("cost", "Cost")
    caption = f"{metric} against size and work; the scale is logarithmic"
    part.picture(figures.cost_chart(report.summary, metric), caption, "Not shown: the run recorded no cost.", full=True)
    return part


def _terms(report: Report) -> Section:
    part = Section("terms", "Loss terms and alarms")
    phase = report.summary.get("main_phase", "student")
    part.picture(figures.terms(report.log, "share", phase), "share of each term in the update", "No shares: the log does not hold them.")
    part.picture(figures.terms(report.log, "norm", phase), "gradient norm of each term", "No gradient norms: the log does not hold them.")
    part.alarms = [f"{a.get('phase', 'run')}, step {a.get('step', '?')}: {a['alarm']}" for a in report.log if a.get("alarm")]
    part.text = f"{len(part.alarms)} alarm(s)." if part.alarms else "No alarm was raised."
    return part


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(report: Report) -> Section:
    summary = report.summary
    names = ("method", "wing", "seed", "seeds", "name", "seconds", "phases", "versions", "device", "machine")
    facts = [(name, tables.duration(summary[name]) if name == "seconds" else _flat(summary[name])) for name in names if name in summary]
    part = Section("versions", "Versions and seeds", facts=facts)
    if not facts:
        part.absent.append("The run recorded no versions.")
    return part


def _recipe(report: Report) -> Section:
    absent = [] if report.recipe_yaml else ["The recipe was not recorded."]
    return Section("recipe", "Resolved recipe", code=report.recipe_yaml, absent=absent)


def _command(report: Report) -> Section:
    command = str(report.summary.get("command") or "")
    return Section("repeat", "Repeat this run", code=command, absent=[] if command else ["The command was not recorded."])


def _render(title: str, headline: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, FunctionLoader
    from markupsafe import Markup

    folder = resources.files("limbeck.report") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = "\n" + (folder / "page.css").read_text("utf-8")
    mark = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()  # this very style and no other, so that none can be injected
    return environment.get_template("page.html.j2").render(title=title, headline=headline, sections=sections, css=Markup(css), mark=mark)


def render_report(report: Report) -> str:
    """The HTML of a run's page."""
    clean = Report(**{**vars(report), "logits": {k: v.detach().float().cpu() for k, v in report.logits.items()}})
    clean.labels = None if report.labels is None else report.labels.detach().cpu().to(torch.int64)
    clean.inputs = None if report.inputs is None else report.inputs.detach().cpu()
    usual = (_ceiling, _curves, _disagreement, _reliability, _cost)
    own = [part(clean) for part in usual] if report.own is None else report.own
    last = [part(clean) for part in (_terms, _facts, _recipe, _command)]
    return _render(report.title, tables.headline(report.summary), [_table(clean), *report.more, *own, *last])


def write_report(path: str | Path, report: Report) -> None:
    """Write a run's page, whole or not at all."""
    storage.write_text(path, render_report(report))


def write_comparison_report(
    path: str | Path, comparison: Comparison, title: str = "Comparison", recipe_yaml: str = "", command: str = ""
) -> None:
    """Write the page of methods side by side: the table of each figure, paired differences, every run, the recipe."""
    from limbeck.evaluation.comparison import cells_of

    metric, reference = comparison.main_metric, comparison.main_reference
    head = ["method", "seeds", "mean ± sd", "95 % interval", f"difference to {reference}", "p", "better seeds"]
    sections = []
    for name in [metric, *(m for m in comparison.metrics if m != metric)] if metric else []:
        lines = comparison.table(name)
        rows = [{"key": "", "name": line["label"], "cells": [line["n"], *cells_of(line)]} for line in lines]
        part = Section(f"table-{len(sections)}", name, head=head, rows=rows)
        drawn = figures.forest(lines, reference, name)
        part.picture(drawn, "paired over common seeds", f"No differences: no method shares a finished seed with {reference}.", full=True)
        sections.append(part)
    note = "Differences are paired by seed; intervals and p are Student's t, not corrected for the number of methods compared."
    if sections:
        sections[0].text = note
    else:
        sections.append(Section("table-0", "Result", absent=["No run has finished, so there is nothing to compare."]))
    runs = [
        {
            "key": "",
            "name": row.get("label") or row["method"],
            "cells": [
                row["seed"],
                row.get("status", "done"),
                tables.duration(row.get("seconds")),
                *(tables.figure(m, (row.get("metrics") or {}).get(m)) for m in comparison.metrics),
            ],
        }
        for row in comparison.rows
    ]
    sections.append(Section("runs", "Every run", head=["method", "seed", "status", "time", *comparison.metrics], rows=runs))
    if comparison.notes:
        sections.append(Section("notes", "Notes", facts=[(k, _flat(v)) for k, v in comparison.notes.items()]))
    report = Report(title, {"command": command}, recipe_yaml=recipe_yaml)
    sections += [_recipe(report), _command(report)]
    storage.write_text(path, _render(title, _comparison_headline(comparison), sections))


def _comparison_headline(comparison: Comparison) -> str:
    metric = comparison.main_metric
    lines = [line for line in comparison.table(metric) if line["difference"] is not None] if metric else []
    if not lines:
        return f"{len(comparison.methods)} method(s), {len(comparison.rows)} run(s); nothing to set against each other."
    sure = [str(line["label"]) for line in lines if line["verdict"] == "reproduced"]
    what = ", ".join(sure) if sure else "None of them"
    return f"{what} beat{'s' if len(sure) < 2 else ''} {comparison.main_reference} in {metric}, with a 95 % interval that leaves out zero."
