"""The live line of a run: phase, step, terms of the loss with their shares, rate, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from limbeck.engine.callbacks import Callback
from limbeck.errors import printable


class Progress(Callback):
    """Shows phases on a terminal as bars; into a file or a pipe as one plain line every few seconds.

    Args:
        console: where to; standard error by default, so that standard output holds results only.
        every: seconds between plain lines.
    """

    def __init__(self, console: Console | None = None, every: float = 5.0) -> None:
        self.console = console or Console(file=sys.stderr)
        self.live = self.console.is_terminal
        self.every, self._said = every, 0.0
        self.total, self.phase, self.text = 0, "", ""
        self._shares: dict[str, str] = {}
        self._began, self._first = time.monotonic(), 0
        self._bar: RichProgress | None = None
        self._task: Any = None

    def start(self, phase: str, step: int, total: int) -> None:
        """A new bar, from `step` on when a run is resumed."""
        self.phase, self.total, self.text, self._shares = phase, total, "", {}
        self._began, self._first = time.monotonic(), step
        if self.live:
            if self._bar is None:
                self._bar = RichProgress(
                    TextColumn("{task.description:<10}"),
                    BarColumn(bar_width=24),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[terms]}", markup=False),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=self.console,
                )
                self._bar.start()
            self._task = self._bar.add_task(phase, total=total, completed=step, terms="")
        else:
            self.console.print(f"{phase}: step {step} of {total}" + (" (resumed)" if step else ""), highlight=False)
            self._said = time.monotonic()

    def log(self, record: dict[str, Any]) -> None:
        """Terms to the line; alarms and measurements above it."""
        if "alarm" in record:
            self._print(f"alarm in {record['phase']} at step {record['step']}: {record['alarm']}")
            return
        if "metrics" in record:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in list(record["metrics"].items())[:4])
            self._print(f"{record['phase']} step {record['step']}: {shown}")
            return
        terms = []
        for name, parts in record["terms"].items():
            if "share" in parts:  # measured now and then; the last measurement stays on the line
                self._shares[name] = f" (|g| {parts['norm']:.2g}, {parts['share']:.0%})"
            terms.append(f"{name} {parts.get('value', float('nan')):.3g}{self._shares.get(name, '')}")
        self.text = f"{' + '.join(terms)} | {record['rate']:.0f}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], terms=self.text)
        elif time.monotonic() - self._said > self.every:
            self._said = time.monotonic()
            done = record["step"] - self._first
            left = (time.monotonic() - self._began) / max(done, 1) * (self.total - record["step"])
            self.console.print(
                printable(f"{record['phase']}: step {record['step']} of {self.total}  {self.text}  {left:.0f} s left"),
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def tick(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def finish(self, phase: str) -> None:
        """Fill the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.total)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        (self._bar.console if self._bar is not None else self.console).print(printable(text), highlight=False, markup=False, soft_wrap=True)
