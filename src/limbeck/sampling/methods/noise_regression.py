"""Noise to image by regression: the plainest distillation, against which data-free trajectory methods argue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.trajectories import TeacherPairs


@dataclass
class NoiseRegression(FewStep):
    """Store pairs of noise and the teacher's sample from it, and regress the one-step prediction on them.

    L = mean (x0(z, t_noise) - x_teacher(z))^2.
    """

    card = Card(
        id="noise-regression",
        title="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        year=2021,
        wing="sampling",
        family="baseline",
        claim="One-step samples at the cost of a stored data set of noise and image pairs.",
        equation="L = mean (G(z) - ODE(z))^2",
        arxiv="2101.02388",
        baseline="fewer-steps",
    )
    data_free = True
    one_step = True
    contract = {"pairs": 64, "teacher_steps": 2}

    pairs: int = setting(20000, "stored pairs of noise and sample", at_least=8)
    teacher_steps: int = setting(16, "Heun steps of the teacher for each (BOOT and reflow papers: 16 to 50)", at_least=1)

    def setup(self, pair: Pair) -> None:
        self._pairs = TeacherPairs(pair, self.pairs, self.teacher_steps)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        student = self.pair.student
        noise, aim, labels = self._pairs.draw(self.batch_size)
        t = torch.full((len(noise),), student.process.t_noise, device=noise.device)
        x = self.show(student.x0(float(student.process.scale(t[:1])) * noise, t, labels), labels)
        return {"regression": (x - aim).square().mean()}

    def figures(self, generator: Generator) -> dict[str, float]:
        return {"endpoint_error": self.endpoint_error(generator)}
