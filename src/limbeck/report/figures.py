"""Pictures of a run as `data:` addresses. matplotlib's object interface only: no global state, no window.

Every function returns "" when there is nothing to draw; the page then says why.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.errors import printable
from limbeck.report.tables import NAMES, human

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"teacher": "#7a5195", "baseline": "#8a8f98", "student": "#1f8a5b", "ceiling": "#c9822b"}
_CYCLE = ["#1f8a5b", "#3a6ea5", "#c9822b", "#7a5195", "#b5485d", "#5a7d2a", "#8a8f98", "#2b8c9e"]
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7ea",
    "legend.frameon": False,
    "svg.hashsalt": "limbeck",
}


def _draw(paint: Callable[[Figure], None], width: float, height: float, kind: str = "svg") -> str:
    """Let `paint` fill a new figure (inches) and return it as a data address; the bytes do not depend on the clock."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        paint(figure)
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    content = buffer.getvalue()
    if kind == "svg":
        content = re.sub(rb"<!DOCTYPE[^>]*>|<metadata>.*?</metadata>", b"", content, flags=re.DOTALL)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _plain(text: Any, limit: int = 24) -> str:
    """Text that matplotlib must not read as mathematics, and can draw."""
    text = printable(text)
    return (text if len(text) <= limit else text[: limit - 1] + "…").replace("$", r"\$")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]


def terms(log: Sequence[Mapping[str, Any]], what: str = "value", phase: str = "student") -> str:
    """A loss term's `value`, `norm` or `share` over the steps of a phase."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        if line.get("phase", phase) == phase and "step" in line:
            for name, term in (line.get("terms") or {}).items():
                if isinstance(term, Mapping) and _finite(term.get(what)):
                    series.setdefault(name, []).append((line["step"], term[what]))
    if not series:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for colour, (name, points) in zip(_CYCLE * (1 + len(series) // len(_CYCLE)), series.items()):
            steps, values = zip(*points)
            many = len(values) > 40
            if many:
                axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(steps, _smooth(values, max(1, len(values) // 30)), color=colour, linewidth=1.6, label=_plain(name))
        values = [v for points in series.values() for _, v in points]
        if what != "share" and min(values) > 0 and max(values) > 50 * min(values):
            axes.set_yscale("log")
        if what == "share":
            axes.set_ylim(-0.02, 1.05)
        axes.set_xlabel("step")
        axes.set_ylabel({"value": "loss term", "share": "share of the update", "norm": "gradient norm"}[what])
        axes.legend(loc="best")

    return _draw(paint, 5.2, 3.1)


def metric_curves(log: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> str:
    """A metric over the steps of each phase but the teacher's, whose best figure is drawn as a line."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        value = (line.get("metrics") or {}).get(metric)
        if _finite(value) and "step" in line:
            series.setdefault(line.get("phase", "student"), []).append((line["step"], value))
    if not series:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for phase in [*NAMES, *(p for p in series if p not in NAMES)]:
            points = series.get(phase, [])
            if points and phase == "teacher" and len(series) > 1:
                axes.axhline(points[-1][1], color=COLOURS[phase], linestyle="--", linewidth=1.2, label="teacher, at its end")
            elif points:
                axes.plot(*zip(*points), marker="o", markersize=3, linewidth=1.6, color=COLOURS.get(phase), label=NAMES.get(phase, phase))
        axes.set_xlabel("step")
        axes.set_ylabel(_plain(metric))
        axes.legend(loc="best")

    return _draw(paint, 5.2, 3.1)


def reliability(logits: Mapping[str, Tensor], labels: Tensor, bins: int = 10) -> str:
    """Accuracy against confidence, one panel per model; bars below the diagonal mean a model that is too sure.

    Args:
        logits: model key -> `(N, C)`. labels: `(N,)`, samples with -1 are left out.
    """
    shown = {key: logits[key] for key in NAMES if key in logits}
    known = labels >= 0
    if not shown or not bool(known.any()):
        return ""

    def panel(axes: Axes, key: str, values: Tensor) -> None:
        confidence, answer = values[known].float().softmax(-1).max(-1)
        right = (answer == labels[known]).float()
        slot = (confidence * bins).long().clamp(max=bins - 1)
        count = torch.bincount(slot, minlength=bins).float()
        share = count / count.sum()
        accuracy = torch.bincount(slot, right, minlength=bins) / count.clamp(min=1)
        mean = torch.bincount(slot, confidence, minlength=bins) / count.clamp(min=1)
        ece = float((share * (accuracy - mean).abs()).sum())
        left = [i / bins for i in range(bins)]
        axes.bar(left, accuracy.tolist(), 1 / bins, align="edge", color=COLOURS[key], alpha=0.85, edgecolor="white", label="accuracy")
        axes.bar(left, share.tolist(), 1 / bins, align="edge", color="none", edgecolor="#3c4043", linewidth=0.8, label="share of samples")
        axes.plot([0, 1], [0, 1], color="#3c4043", linestyle=":", linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=f"{NAMES[key]}\nerror {100 * ece:.1f} %")
        axes.title.set_fontsize(9)

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (key, values) in zip(grid, shown.items()):
            panel(axes, key, values)
        grid[0].set_ylabel("accuracy (filled), share (outline)")

    return _draw(paint, 2.6 * len(shown), 2.9)


def cost_chart(summary: Mapping[str, Any], metric: str = "accuracy") -> str:
    """The metric against parameters and against FLOPs (logarithmic), one point per model."""
    metrics, costs = summary.get("metrics") or {}, summary.get("cost") or {}
    points: list[tuple[str, Mapping[str, Any], float]] = []
    for key in NAMES:
        cost = costs.get(key) or (costs.get("student") if key in ("baseline", "ceiling") else None)
        value = (metrics.get(key) or {}).get(metric)
        if cost and _finite(value):
            points.append((key, cost, value))
    axes_of = [(name, title) for name, title in (("params", "parameters"), ("flops", "FLOPs of one sample"))]
    axes_of = [(name, title) for name, title in axes_of if any((cost.get(name) or 0) > 0 for _, cost, _ in points)]
    if not axes_of:
        return ""

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        for axes, (name, title) in zip(figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0], axes_of):
            for key, cost, value in points:
                if (cost.get(name) or 0) > 0:
                    label = f"{NAMES[key]}, {human(cost[name])}"
                    axes.scatter(cost[name], value, s=60, color=COLOURS[key], label=label, zorder=3)
            axes.set_xscale("log")
            axes.margins(x=0.25, y=0.2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(title)
            axes.legend(loc="best", fontsize=8)
        figure.axes[0].set_ylabel(_plain(metric))

    return _draw(paint, 4.6 * len(axes_of), 3.1)


def gallery(inputs: Tensor, indices: Tensor, captions: Sequence[str], columns: int = 8) -> str:
    """Images with a caption each, as one PNG.

    Args:
        inputs: `(N, C, H, W)` with any value range; one channel is drawn grey, the first three of several as colours.
        indices: `(M,)` which of them. captions: M texts.
    """
    count = len(indices)
    if not count or inputs.ndim != 4:
        return ""
    chosen = inputs[indices].detach().float().nan_to_num(0.0)
    chosen = chosen[:, :1] if chosen.shape[1] < 3 else chosen[:, :3]
    low, high = chosen.amin((1, 2, 3), keepdim=True), chosen.amax((1, 2, 3), keepdim=True)
    images = ((chosen - low) / (high - low).clamp(min=1e-8)).permute(0, 2, 3, 1).numpy()
    columns = min(columns, count)
    rows = math.ceil(count / columns)

    def paint(figure: Figure) -> None:
        for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.axis("off")
            if i < count:
                axes.imshow(images[i].squeeze(-1) if images.shape[-1] == 1 else images[i], cmap="gray", interpolation="nearest")
                axes.set_title("\n".join(_plain(part, 18) for part in captions[i].split("\n")), fontsize=7)

    return _draw(paint, 1.2 * columns, 1.65 * rows, "png")


def confusion(logits: Tensor, labels: Tensor, classes: Sequence[str], limit: int = 30) -> str:
    """Share of each true class (rows) that the model gives each name (columns); left out above `limit` classes."""
    known = labels >= 0
    size = logits.shape[-1]
    if size > limit or not bool(known.any()):
        return ""
    table = torch.bincount(labels[known] * size + logits[known].argmax(-1), minlength=size * size).view(size, size).float()
    share = table / table.sum(1, keepdim=True).clamp(min=1)
    names = [_plain(classes[i], 12) if i < len(classes) else str(i) for i in range(size)]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(share.numpy(), cmap="Greens", vmin=0, vmax=1)
        axes.grid(False)
        axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(size), names)
        axes.set(xlabel="the student says", ylabel="true class")
        if size <= 15:
            for i, j in (table > 0).nonzero().tolist():
                axes.text(j, i, int(table[i, j]), ha="center", va="center", fontsize=7, color="white" if share[i, j] > 0.5 else "#333")

    side = min(8.0, max(3.6, 0.36 * size + 1.0))
    return _draw(paint, side, side)


def forest(table: Sequence[Mapping[str, Any]], reference: str, metric: str) -> str:
    """Paired differences to the reference with their intervals, one line per method (rows of `Comparison.table`)."""
    from limbeck.evaluation.statistics import higher_is_better

    shown = [line for line in table if _finite(line.get("difference"))]
    if not shown:
        return ""
    up = higher_is_better(metric)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, line in enumerate(shown):
            low, high = line["difference_interval"] or (line["difference"], line["difference"])
            better, worse = (low > 0, high < 0) if up else (high < 0, low > 0)
            sure = line["difference_interval"] is not None
            colour = "#1f8a5b" if better and sure else "#b5485d" if worse and sure else "#8a8f98"
            axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.scatter(line["difference"], y, color=colour, s=42, zorder=3)
        axes.axvline(0, color="#3c4043", linewidth=1)
        axes.set_yticks(range(len(shown)), [f"{_plain(line['label'])}  (n={line['common']})" for line in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        side = "right" if up else "left"
        axes.set_xlabel(f"{_plain(metric)}: difference to {_plain(reference)}, mean and 95 % interval ({side} is better)")

    return _draw(paint, 7.2, 1.1 + 0.38 * len(shown))
