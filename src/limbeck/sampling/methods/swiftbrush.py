"""SwiftBrush: variational score distillation into a one-step generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, expand
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.losses import field_loss
from limbeck.method import Card, setting
from limbeck.sampling.few_step import Pair
from limbeck.sampling.score_matching import ScoreMatching


@dataclass
class SwiftBrush(ScoreMatching):
    """Text-to-3D's variational score distillation with a one-step image network in the renderer's place; no picture is needed.

    g = sigma_t^2 (eps_T - eps_F) with the same guidance on both, L = 0.5 mean (x - sg[x - g])^2. Who follows the generator is the teacher
    with low-rank adapters, trained by alpha_t^2 |eps_F - n|^2; `follower="none"` puts the injected noise in its place (score distillation
    sampling, Poole et al. 2022). alpha_t and sigma_t are those of the variance-preserving form of the process, cos and sin of its angle,
    so that a noise level weighs the same in every process.
    """

    card = Card(
        id="swiftbrush",
        title="SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
        year=2023,
        wing="sampling",
        family="distribution",
        claim="FID 16.67 and CLIP 0.29 on COCO-30K in one step, without any image data.",
        equation="g = sigma_t^2 (eps_T - eps_F);  L = 0.5 mean (x - sg[x - g])^2",
        arxiv="2312.05239",
        baseline="fewer-steps",
        deviations="adapters on all linear layers where the network has no to_q and to_v; the student's rate is the recipe's",
    )
    one_step = True
    contract = {"rank": 2}

    follower: str = setting(
        "lora", "who follows the generator: adapters on the teacher, a whole copy of it, or nobody", choices=("lora", "full", "none")
    )
    rank: int = setting(64, "of the adapters (paper: 64, with alpha 108)", at_least=1)
    lr_fake: float = setting(1e-3, "learning rate of the follower (paper: 1e-3 for adapters)", above=0)
    null: float = setting(0.1, "share of the follower's updates without labels (paper: 0.1)", at_least=0, at_most=1)

    def make_fake(self, pair: Pair) -> Denoiser:
        made = pair.copy_of_teacher()
        if self.follower == "lora":
            from limbeck.sampling.adapters import add_lora

            ends = {path.rpartition(".")[2] for path, _ in made.network.named_modules()}
            targets = ("to_q", "to_v") if {"to_q", "to_v"} <= ends else None
            made = made.with_network(add_lora(made.network, self.rank, self.rank * 108 / 64, targets).to(pair.device))
        if self.follower == "none":
            made.network.requires_grad_(False)
        return made

    def setup(self, pair: Pair) -> None:
        if self.gan > 0:
            raise UserError("swiftbrush looks at no pictures and has no critic", "set method.gan=0, or use dmd2")
        super().setup(pair)

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        if self.follower != "none":
            return super().optimizers(pair)
        return {"student": make_optimizer(pair.training, [p for p in pair.student.network.parameters() if p.requires_grad])}

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student",) if self.follower == "none" else super().turns(clock)

    def generator_losses(self, x: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        teacher = self.pair.teacher
        assert teacher is not None
        with torch.no_grad():
            level, noise = self.levels(len(x)), torch.randn_like(x)
            state = teacher.process.diffuse(x, noise, level)
            if self.follower == "none":
                other = noise
            else:
                guidance = teacher.guidance
                other = self.fake.guided(guidance.scale, guidance.low, guidance.high).noise(state, level, labels)
            sigma = expand(teacher.process.angle(level).sin(), x)
            step = torch.nan_to_num(sigma**2 * (teacher.noise(state, level, labels) - other))
        return {"score": field_loss(x, step)}

    def fake_losses(self, x: Tensor, labels: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        process, level, noise = self.fake.process, self.levels(len(x), 0.0, 1.0), torch.randn_like(x)
        if labels is not None and float(torch.rand(())) < self.null:
            labels = torch.full_like(labels, self.pair.classes)
        error = self.fake.noise(process.diffuse(x, noise, level), level, labels) - noise
        return {"fake": (expand(process.angle(level).cos(), x) * error).square().mean()}
