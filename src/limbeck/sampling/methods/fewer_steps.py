"""The teacher itself with fewer steps: what every few-step method must beat."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.method import Card
from limbeck.sampling.few_step import FewStep
from limbeck.sampling.generator import Generator
from limbeck.sampling.trajectories import guidance_error


@dataclass
class FewerSteps(FewStep):
    """The student as it is, sampled by the first-order solver in the steps that are asked for; nothing is trained."""

    card = Card(
        id="fewer-steps",
        title="Denoising diffusion implicit models",
        year=2020,
        wing="sampling",
        family="baseline",
        claim="Ten to fifty times fewer steps than ancestral sampling.",
        equation="x_s = alpha_s x0(x_t) + sigma_s z(x_t)",
        arxiv="2010.02502",
        baseline="",
    )
    data_free = True
    trains = False
    sampler = "ddim"

    def figures(self, generator: Generator) -> dict[str, float]:
        """`guidance_error` where the teacher is guided: what leaving guidance out costs, at the greatest number of steps."""
        teacher = self.pair.teacher
        if teacher is None or not teacher.guidance.acts:
            return {}
        return {"guidance_error": guidance_error(self.pair, generator, max(self.pair.spec.steps))}

    def sampling(self) -> dict[str, object]:
        return {"grid": self.pair.spec.grid}
