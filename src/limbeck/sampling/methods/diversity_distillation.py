"""Diversity distillation: the base model takes the first step, where diversity is decided, the distilled one the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.diffusion import Denoiser
from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator


@dataclass
class DiversityDistillation(FewStep):
    """Nothing is trained: the teacher, guided as the recipe says, makes the steps of its own schedule down to the distilled model's step
    number `replaced`; there the state is handed over by equal noise level, and the distilled model makes its remaining steps.

    The student must be distilled already (`student.train` or a generator's folder). Calls a picture count both models' passes.
    """

    card = Card(
        id="diversity-distillation",
        title="Distilling Diversity and Control in Diffusion Models",
        year=2025,
        wing="sampling",
        family="after distillation",
        claim="One base step restores the diversity that distillation lost, even beyond the base, at nearly the distilled speed.",
        equation="x_{n_k} from base steps m_0..m_j, j = argmin |m_j - n_k|;  then distilled steps k, k+1, ...",
        arxiv="2503.10637",
        baseline="",
        deviations="the distilled model is told the level that the base really reached, not the nearest of its own",
    )
    data_free = True
    trains = False

    replaced: int = setting(1, "k: steps of the distilled model that the base makes in its stead (paper: 1)", at_least=1)
    base_steps: int = setting(20, "steps of the base model's whole schedule, of which only the first are made (paper: 20)", at_least=2)

    def bind(self, pair: Pair) -> None:
        super().bind(pair)
        short = [steps for steps in pair.spec.steps if steps <= self.replaced]
        if short:
            raise UserError(
                f"diversity-distillation replaces {self.replaced} of the steps, and generate.steps asks for {short[0]} in all",
                "set generate.steps above method.replaced",
            )

    def finish(self, student: Denoiser) -> Generator:
        options = {"replaced": self.replaced, "base_steps": self.base_steps}
        sampler = self.pair.spec.sampler or self.sampler
        return Generator(student, self.pair.pictures.shape, sampler=sampler, options=options, base=self.pair.teacher)

    @torch.no_grad()
    def figures(self, generator: Generator) -> dict[str, float]:
        """`diversity_at_first`: spread over noises of what the first step would end in, base over student."""
        pair = self.pair
        rng = torch.Generator().manual_seed(pair.seed)
        noise = torch.randn(256, *pair.pictures.shape, generator=rng).to(pair.device)
        labels = None if not pair.classes else torch.zeros(256, dtype=torch.long, device=pair.device)
        spreads: list[Tensor] = []
        for denoiser in (pair.teacher, generator.denoiser):
            assert denoiser is not None
            t = torch.full((256,), denoiser.process.t_noise, device=pair.device)
            spreads.append(denoiser.x0(denoiser.process.scale(t[:1]) * noise, t, labels).var(0).mean().sqrt())
        return {"diversity_at_first": float(spreads[0] / spreads[1].clamp_min(1e-12))}
