"""CDA: SRe2L's recovery from the whole image to ever smaller parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from limbeck.condensation.methods.sre2l import SRe2L
from limbeck.engine.clock import Clock
from limbeck.method import Card, setting

CURVES = ("cosine", "linear", "step")


def curriculum(progress: float, milestone: float, floor: float, curve: str) -> float:
    """The least area of a part when a share `progress` of the recovery is done: from 1 down to `floor` at `milestone`, then `floor`."""
    if progress >= milestone:
        return floor
    if curve == "step":
        return 1.0
    done = progress / milestone
    return floor + (1 - floor) * (1 - done if curve == "linear" else (1 + math.cos(math.pi * done)) / 2)


@dataclass
class CDA(SRe2L):
    """SRe2L with a curriculum: first the layout of the whole image, then its parts.

    min_scale_i = floor + (1 - floor) (1 + cos(pi i / i_m)) / 2 for i < i_m = milestone * iterations, then floor; parts have an area in
    [min_scale_i, 1]. Everything else is SRe2L.
    """

    card = Card(
        id="cda",
        title="Dataset distillation via curriculum data synthesis in large data era",
        year=2023,
        wing="condensation",
        family="inversion",
        claim="A curriculum over crops gives the highest accuracy on ImageNet-1K and 21K, more than 4 points above SRe2L.",
        equation="min_scale = floor + (1 - floor) (1 + cos(pi i / i_m)) / 2",
        arxiv="2311.18838",
        baseline="sre2l",
        deviations="As sre2l.",
    )

    curve: str = setting("cosine", "how the least area falls (paper: cosine)", choices=CURVES)
    milestone: float = setting(
        1.0, "share of the recovery after which it stays at min_scale (scripts: 1; the code's default 0 is SRe2L)", above=0, at_most=1
    )

    def least_scale(self, clock: Clock) -> float:
        return curriculum(clock.progress, self.milestone, self.min_scale, self.curve)
