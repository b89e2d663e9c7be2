"""FreeFlow: a flow map learned from the prior alone, its inherited errors corrected by a score difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from limbeck.data.batch import Batch
from limbeck.diffusion import Flow, expand
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator


@dataclass
class FreeFlow(FewStep):
    """F(z, d) is the average velocity from z over a way d towards the data, f(z, d) = z + d F; differentiating the end point by d gives
    the velocity that it arrives with, which must be the teacher's there (u = -dx/dt).

    prediction: D = F + d dF/dd - u(f, 1 - d), |F - sg[F - w D]|^2 with w = 1 / (|D|^2 / numel + eps)^k per sample;
    correction: the velocity field of the student's noised samples, learned online, against the teacher's, scaled to the size of D.
    """

    card = Card(
        id="freeflow",
        title="Flow Map Distillation Without Data",
        year=2025,
        wing="sampling",
        family="trajectory",
        claim="FID 1.45 on ImageNet 256 and 1.49 on 512 in one step, from SiT-XL/2+REPA, without any data.",
        equation="D = F + d dF/dd - u(z + dF, 1-d);  D_N = u_teacher - u_student on noised samples, with signs of generation",
        arxiv="2511.19428",
        baseline="rf-plus-plus",
        certainty="paper-text",
        deviations="alpha, eps and the step of the difference quotient are ours; the balance is taken after the adaptive weight",
    )
    data_free = True
    one_step = True
    sampler = "from-noise"

    share: float = setting(0.75, "of the batch that learns by prediction, the rest by correction (paper: 0.75)", at_least=0, at_most=1)
    power: float = setting(1.0, "k of the adaptive weight (paper: 1)", at_least=0)
    mean: float = setting(0.8, "of the logit-normal noise level of the correction (paper: 0.8, biased to noise)")
    spread: float = setting(1.0, "its standard deviation (paper: 1)", above=0)
    alpha: float = setting(1.0, "size of the correction beside the prediction", at_least=0)
    eps: float = setting(1e-3, "keeps the weights finite", above=0)
    derivative: str = setting("forward", "of F by d: forward mode, or a central difference", choices=("forward", "difference"))
    step: float = setting(0.005, "of the central difference", above=0, at_most=0.1)
    lr_fake: float = setting(3e-4, "learning rate of the network that follows the student", above=0)

    def setup(self, pair: Pair) -> None:
        assert pair.teacher is not None
        self._flow, self._teacher = pair.student.under(Flow()), pair.teacher.under(Flow())
        fake = pair.copy_of_teacher()
        self.parts["fake"] = fake.network
        self._fake = fake.under(Flow())

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        return {
            "student": make_optimizer(pair.training, [p for p in pair.student.network.parameters() if p.requires_grad]),
            "fake": make_optimizer(pair.training, self.parts["fake"].parameters(), lr=self.lr_fake),
        }

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student",) if self.share == 1 else ("student", "fake")

    def average(self, noise: Tensor, way: Tensor, labels: Tensor | None) -> Tensor:
        """F(z, d): average velocity towards the data."""
        return self._flow.from_noise(noise, 1 - way, labels) - noise

    def slope(self, noise: Tensor, way: Tensor, labels: Tensor | None) -> Tensor:
        """dF/dd with z fixed."""
        if self.derivative == "forward":
            return jvp(lambda d: self.average(noise, d, labels), (way,), (torch.ones_like(way),))[1]
        low, high = (way - self.step).clamp_min(0), (way + self.step).clamp_max(1)
        return (self.average(noise, high, labels) - self.average(noise, low, labels)) / expand(high - low, noise)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        pair, count = self.pair, self.batch_size
        if turn == "fake":
            x, labels = self._samples
            t = torch.rand(len(x), device=x.device)
            noise = torch.randn_like(x)
            seen, other = self._fake.parts(self._fake.process.diffuse(x, noise, t), t, labels)
            return {"fake": ((other - seen) - (noise - x)).square().mean()}
        first = round(self.share * count)
        if self.share < 1:  # the turn of the fake needs samples, also of a small batch
            first = min(first, count - 1)
        terms: dict[str, Tensor] = {}
        size = torch.ones((), device=pair.device)
        if first:
            noise, labels = pair.noise(first), pair.labels(first)
            way = torch.rand(first, device=pair.device)
            made = self.average(noise, way, labels)
            with torch.no_grad():
                reached = noise + expand(way, noise) * made
                gap = made + expand(way, noise) * self.slope(noise, way, labels) + self._teacher.velocity(reached, 1 - way, labels)
                norm = gap.flatten(1).square().mean(1)
                gap = gap * expand((norm + self.eps) ** -self.power, gap)
                size = gap.flatten(1).norm(dim=1).mean()
            terms["prediction"] = (made - (made - gap).detach()).square().mean() * self.share
        if first < count:
            noise, labels = pair.noise(count - first), pair.labels(count - first)
            made = self.average(noise, torch.ones(count - first, device=pair.device), labels)
            x = self.show(noise + made, labels)
            self._samples = (x.detach(), labels)
            with torch.no_grad():
                level = torch.sigmoid(self.mean + self.spread * torch.randn(len(x), device=x.device))
                state = self._teacher.process.diffuse(x, torch.randn_like(x), level)
                gap = self._teacher.velocity(state, level, labels) - self._fake.velocity(state, level, labels)
                gap = gap * (self.alpha * size / (gap.flatten(1).norm(dim=1).mean() + self.eps))
            terms["correction"] = (made - (made - gap).detach()).square().mean() * (1 - self.share)
        return terms

    def figures(self, generator: Generator) -> dict[str, float]:
        return {"endpoint_error": self.endpoint_error(generator)}
