"""Pictures that any wing may use: lines over an amount, and a table of shares as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from limbeck.report.figures import _CYCLE, _draw, _plain
from limbeck.report.tables import human

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lines(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    x_title: str,
    y_title: str,
    bold: str = "",
    level: tuple[str, float] | None = None,
    log_y: bool = False,
) -> str:
    """One line for each series over a logarithmic amount, with a bar of its spread.

    Args:
        series: name -> points `(x, y, spread)`.
        x_title, y_title: of the axes.
        bold: the series that the picture is about.
        level: a horizontal line, its name and height.
        log_y: a logarithmic upward axis.
    """
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return ""

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes = figure.subplots()
        colours = iter(_CYCLE[1:] * (1 + len(shown) // (len(_CYCLE) - 1)))
        for name, points in shown.items():
            xs, ys, spreads = zip(*sorted(points))
            main = name == bold
            colour = _CYCLE[0] if main else next(colours)
            axes.errorbar(
                xs,
                ys,
                spreads,
                marker="o",
                markersize=6 if main else 4,
                linewidth=2.2 if main else 1.3,
                color=colour,
                label=_plain(name, 40),
            )
        if level is not None:
            axes.axhline(level[1], color="#3c4043", linewidth=1, linestyle=":", label=_plain(level[0], 40))
        axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=_plain(x_title, 60), ylabel=_plain(y_title, 60))
        axes.margins(x=0.12)
        axes.legend(fontsize=8)

    return _draw(paint, 6.4, 3.6)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], digits: int = 1) -> str:
    """A table of shares in [0, 1] as colours with their percent.

    Args:
        rows, columns: names.
        values: a row of shares for each row.
    """
    if not rows or not columns:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        low = min(min(row) for row in values)
        high = max(max(row) for row in values)
        axes.imshow(values, cmap="Greens", vmin=low - 0.05, vmax=high + 0.02, aspect="auto")
        axes.grid(False)
        axes.set_xticks(range(len(columns)), [_plain(name, 28) for name in columns], rotation=20, ha="right")
        axes.set_yticks(range(len(rows)), [_plain(name, 36) for name in rows])
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                dark = value > (low + high) / 2 + 0.05
                axes.text(j, i, f"{100 * value:.{digits}f}", ha="center", va="center", fontsize=8, color="white" if dark else "#333")

    return _draw(paint, 2.6 + 1.3 * len(columns), 1.2 + 0.42 * len(rows))


def front(names: Sequence[str], points: Sequence[tuple[float, float]], best: Sequence[int], x_title: str, y_title: str) -> str:
    """One mark for each model over a logarithmic cost; a line joins those that no other beats.

    Args:
        names: of the models.
        points: `(cost, quality)` of each.
        best: positions of the models on the front.
        x_title, y_title: of the axes.
    """
    if not points:
        return ""

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes = figure.subplots()
        line = sorted(points[number] for number in best)
        axes.plot(*zip(*line), color="#9aa0a6", linewidth=1.2, linestyle="--", zorder=1)
        for number, (name, (x, y)) in enumerate(zip(names, points)):
            colour = _CYCLE[number % len(_CYCLE)]
            axes.scatter(x, y, s=70 if number in best else 40, color=colour, label=_plain(name, 40), zorder=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=_plain(x_title, 60), ylabel=_plain(y_title, 60))
        axes.margins(x=0.15, y=0.15)
        axes.legend(fontsize=8)

    return _draw(paint, 5.6, 3.4)
