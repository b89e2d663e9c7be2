"""Balanced score distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.diffusion import expand
from limbeck.errors import UserError
from limbeck.losses import least_norm
from limbeck.method import Card, setting
from limbeck.scenes.score_method import Noised, PictureProblem, ScoreDistillation

DIMENSION = 4 * 64 * 64
"""Numbers of the latents that the paper's weight of the automatic variant was chosen for."""


@dataclass
class BSD(ScoreDistillation):
    """Neither direction may dominate: the step is the least-norm point between "toward the class" and "toward clean pictures".

    grad_x = w (a g1 + (1 - a) g2), a for each sample. auto: g1 = e_y - e_u, g2 = 1.25 (e_u - eps), w = |e_u - eps| sigma / 50 with the norm
    of the whole batch. fixed: g1 = 15 (e_y - e_u), g2 = e_u, w = sqrt(abar), without any noise subtracted.
    """

    card = Card(
        id="bsd",
        title="PlacidDreamer: Advancing Harmony in Text-to-3D Generation",
        year=2024,
        wing="scenes",
        family="score",
        claim="Rich details and balanced saturation by a Pareto-optimal direction between two objectives.",
        equation="grad_x = w (a g1 + (1 - a) g2),  a = clip(<g2 - g1, g2> / |g2 - g1|^2, 0, 1)",
        arxiv="2407.13976",
        baseline="sds",
        deviations=(
            "the score objective alone, without the latent plane; the batch norm in the weight is scaled to the number of pixels, so that "
            "it means the same at any size; a stronger `ratio` gives the class less say, as in the paper"
        ),
    )

    variant: str = setting("auto", "which pair of directions and which weight", choices=("auto", "fixed"))
    ratio: float = setting(15.0, "length of the class direction before balancing, variant fixed (paper: 15)", above=0)
    smoothing: float = setting(1.25, "length of the denoising direction before balancing, variant auto (paper: 1.25)", above=0)
    norm: float = setting(50.0, "what the batch's norm is divided by, variant auto (paper: 50)", above=0)
    offset: float = setting(0.1, "standard deviation of noise that is constant over each channel (offset noise; paper: 0.1)", at_least=0)
    guidance: float = setting(1.0, "not used: the balance takes its place", at_least=1, at_most=1)

    def setup(self, problem: PictureProblem) -> None:
        super().setup(problem)
        if problem.labels is None or not problem.teacher.classes:
            raise UserError("bsd balances two directions, and without classes there is one", "give labelled data and a conditional teacher")
        if bool((problem.labels == problem.teacher.classes).all()):
            raise UserError("bsd balances two directions, and scene.label asks for no class", "set scene.label to a class")

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn_like(x) + self.offset * torch.randn(*x.shape[:2], 1, 1, device=x.device)

    def balance(self, at: Noised) -> tuple[Tensor, Tensor, Tensor]:
        """The two directions `(B, C, H, W)` and the weight `(B,)`."""
        free, given = at.free(), at.given()
        if self.variant == "fixed":
            return self.ratio * (given - free), free, at.angle.cos()
        rest = free - at.noise
        size = rest.norm() * (DIMENSION / rest[0].numel()) ** 0.5
        return given - free, self.smoothing * rest, size * at.angle.sin() / self.norm

    def gradient(self, at: Noised) -> Tensor:
        toward_class, toward_clean, weight = self.balance(at)
        return expand(weight, at.x) * least_norm(toward_class, toward_clean)[0]
