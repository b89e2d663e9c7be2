"""Where a training run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """Counts optimiser steps; everything else follows from that number.

    Attributes:
        step: steps finished so far (the step being computed has this number, from 0).
        steps_per_epoch: steps in one pass over the training split.
        total: steps of the whole run.
    """

    step: int
    steps_per_epoch: int
    total: int

    @property
    def epoch(self) -> int:
        """Whole epochs finished."""
        return self.step // self.steps_per_epoch

    @property
    def epochs(self) -> float:
        """Epochs of the whole run; not always a whole number."""
        return self.total / self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / self.total if self.total else 1.0
