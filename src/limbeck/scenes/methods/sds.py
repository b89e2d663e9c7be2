"""Score distillation sampling: the baseline of this half of the wing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.method import Card, setting
from limbeck.scenes.score_method import Noised, ScoreDistillation


@dataclass
class SDS(ScoreDistillation):
    """Move renderings to where the score model, guided, would denoise them: the injected noise is what is subtracted.

    grad_x = w(t) (eps(x_t; y, s) - eps). It seeks modes: one picture for each start, and it needs a guidance near 100 to be sharp.
    """

    card = Card(
        id="sds",
        title="DreamFusion: Text-to-3D using 2D Diffusion",
        year=2022,
        wing="scenes",
        family="baseline",
        claim="Text-to-3D without 3-D data, by optimising a field under a picture model.",
        equation="grad_x = w(t) (eps_pre(x_t; y, s) - eps)",
        arxiv="2209.14988",
        baseline="",
        certainty="recalled",
    )

    guidance: float = setting(100.0, "classifier-free guidance of the score model (paper: 100)", at_least=0)
    levels_end: tuple[float, float] = setting(
        (0.02, 0.98), "the same at the end (paper: the whole range throughout)", at_least=0, at_most=1
    )

    def direction(self, at: Noised) -> Tensor:
        return at.guided(self.guidance) - at.noise
