"""BOOT: a network that sees only the initial noise learns where the teacher's sampler would stand, each time from the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import expand
from limbeck.engine.clock import Clock
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep
from limbeck.sampling.generator import Generator


@dataclass
class BOOT(FewStep):
    """y(z, t) is the signal part (x_t - sigma_t z) / alpha_t of the teacher's path that starts at z; it obeys an equation of its own,

    y_s = rho y_t + (1 - rho) f(x_t, t) with rho = (alpha_t sigma_s) / (sigma_t alpha_s), f the teacher's clean prediction: neighbouring
    times teach each other, from noise to data, without any picture. L = |y(z, s) - sg[...]|^2 + beta |y(z, t_max) - f(z, t_max)|^2; x0 =
    y(z, t_min).
    """

    card = Card(
        id="boot",
        title="BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping",
        year=2023,
        wing="sampling",
        family="trajectory",
        claim="One-step generation comparable to the teacher's DDIM samples, without data and orders of magnitude faster.",
        equation="L = w |y(z,s) - sg[rho y(z,t) + (1-rho) f(x_t,t)]|^2 + beta |y(z,T) - f(z,T)|^2",
        arxiv="2306.05544",
        baseline="noise-regression",
        certainty="recalled",
        deviations=(
            "values other than delta and the range of times are recalled; the student's output is read as at the noise end at every time"
        ),
    )
    data_free = True
    one_step = True
    sampler = "from-noise"

    delta: float = setting(
        0.04, "step between neighbouring times, as a share of the range (0.04 in a re-implementation)", above=0, at_most=0.5
    )
    beta: float = setting(0.1, "weight of the boundary term (recalled)", at_least=0)
    order: int = setting(2, "of the teacher's step: 1, or 2 (mean of both ends)", choices=(1, 2))
    weight: str = setting(
        "plain",
        "of the bootstrap: plain (the velocity form, milder), or residual (divided by (1 - rho)^2, clipped at 100)",
        choices=("plain", "residual"),
    )
    least: float = setting(0.01, "lowest position, where samples are taken", at_least=0, at_most=0.5)
    most: float = setting(0.99, "highest position", at_least=0.5, at_most=1)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        pair = self.pair
        student, teacher, process, count = pair.student, pair.teacher, pair.student.process, self.batch_size
        assert teacher is not None
        noise, labels = pair.noise(count), pair.labels(count)
        place = self.least + self.delta + torch.rand(count, device=pair.device) * (self.most - self.least - self.delta)
        t, s = process.at(place), process.at((place - self.delta).clamp_min(self.least))
        with torch.no_grad():
            y = student.from_noise(noise, t, labels)
            rho = expand(process.alpha(t) * process.sigma(s) / (process.sigma(t) * process.alpha(s)), noise)
            seen = teacher.x0(process.diffuse(y, noise, t), t, labels)
            aim = rho * y + (1 - rho) * seen
            if self.order == 2:
                seen = (seen + teacher.x0(process.diffuse(aim, noise, s), s, labels)) / 2
                aim = rho * y + (1 - rho) * seen
            end = process.at(torch.full((count,), self.most, device=pair.device))
            first = teacher.x0(process.diffuse(torch.zeros_like(noise), noise, end), end, labels)
        made = self.show(student.from_noise(noise, s, labels), labels)
        weight = 1.0 if self.weight == "plain" else (1 - rho).square().reciprocal().clamp(max=100.0)
        terms = {"bootstrap": (weight * (made - aim).square()).mean()}
        if self.beta:
            terms["boundary"] = self.beta * (student.from_noise(noise, end, labels) - first).square().mean()
        return terms

    def sampling(self) -> dict[str, Any]:
        process = self.pair.student.process
        return {"end": float(process.at(torch.tensor(self.least, dtype=torch.float64)))}

    def figures(self, generator: Generator) -> dict[str, float]:
        return {"endpoint_error": self.endpoint_error(generator)}
