"""SANA-Sprint: continuous-time consistency under a trigonometric process, repaired by an adversarial term on the teacher's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, Trig, expand
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.losses import critic_loss, fooling_loss
from limbeck.method import Card, setting
from limbeck.sampling.critics import Heads, widths_of
from limbeck.sampling.few_step import FewStep, Pair, frozen
from limbeck.zoo.denoising import Condition, zeroed


class LogVariance(nn.Module):
    """How uncertain the loss is at a time, learned: `(B,)` from t `(B,)` in [0, pi/2] (Karras et al. 2024,
    arXiv:2312.02696); 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Condition(0, 32, 0.2, 4.0, "log-variance")
        self.out = zeroed(nn.Linear(32, 1))

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.embed(t * (2 / math.pi), None, len(t)))[:, 0]


@dataclass
class SanaSprint(FewStep):
    """Any network is read as x = cos(t) x0 + sin(t) z with dx/dt = F, an exact change of input, time and output, so that nothing is trained
    again.

    g = -cos^2 (F- - V) - r (cos sin x + J), J = cos sin dF/dt along the teacher's path V, r warming up; g <- g / (|g| + c);
    L = mean e^(-l) (F - F- - g)^2 / tan t + l with a learned log-variance l(t); + `adversarial` * (-D(x0hat re-noised)), hinge heads on
    the frozen teacher's stages, half of the second passes from pure noise.
    """

    card = Card(
        id="sana-sprint",
        title="SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
        year=2025,
        wing="sampling",
        family="trajectory",
        claim="7.59 FID and 0.74 GenEval in one step, better and ten times faster than FLUX-schnell.",
        equation="g = -cos^2(F- - V) - r cos sin (x + dF/dt);  L = e^-l |F - F- - g|^2 / tan t + l + 0.5 L_adv",
        arxiv="2503.09641",
        baseline="consistency",
        deviations=(
            "numbers in units of sigma_data (1 here, as pictures are in [-1, 1]); guidance is the recipe's one scale and not "
            "embedded; heads "
            "without the reference's long convolutions"
        ),
    )
    contract = {"warmup": 2}

    mean: float = setting(0.2, "of log tan t of the student (paper: 0.2)")
    spread: float = setting(1.6, "its standard deviation (paper: 1.6)", above=0)
    mean_critic: float = setting(-0.6, "of log tan t of what the critic sees (paper: -0.6)")
    spread_critic: float = setting(1.0, "its standard deviation (paper: 1)", above=0)
    warmup: int = setting(4000, "steps in which the tangent grows to full size (paper: 4000)", at_least=1)
    norm: float = setting(0.1, "c of the tangent's normalisation (paper: 0.1)", above=0)
    adversarial: float = setting(0.5, "weight of the adversarial term (paper: 0.5); 0 leaves the consistency loss alone", at_least=0)
    largest: float = setting(0.5, "share of the adversarial passes that begin at pure noise (paper: 0.5)", at_least=0, at_most=1)
    misaligned: bool = setting(True, "real pictures under others' labels are shown to the critic as fakes (paper: yes)")
    lr_critic: float = setting(1e-3, "learning rate of the heads", above=0)
    derivative: str = setting(
        "forward", "of the network along the path: forward mode, or a central difference", choices=("forward", "difference")
    )

    def setup(self, pair: Pair) -> None:
        assert pair.teacher is not None
        self._student, self._teacher = pair.student.under(Trig()), pair.teacher.under(Trig())
        self.parts["variance"] = LogVariance().to(pair.device)
        if self.adversarial:
            self.parts["heads"] = Heads(widths_of(pair.teacher, pair), pair.classes, spectral=True).to(pair.device)

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        learning = [p for m in (pair.student.network, self.parts["variance"]) for p in m.parameters() if p.requires_grad]
        found = {"student": make_optimizer(pair.training, learning)}
        if self.adversarial:
            found["critic"] = make_optimizer(pair.training, self.parts["heads"].parameters(), lr=self.lr_critic)
        return found

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student", "critic") if self.adversarial else ("student",)

    def _times(self, count: int, mean: float, spread: float) -> Tensor:
        t = (torch.randn(count, device=self.pair.device) * spread + mean).exp().atan()
        return t.clamp(1e-3, math.pi / 2 - 1e-3)

    def output(self, x: Tensor, t: Tensor, labels: Tensor | None, denoiser: Denoiser | None = None) -> Tensor:
        """F(x, t) = cos(t) z - sin(t) x0 of what the network sees: dx/dt along its own path."""
        return (denoiser or self._student).read("v", x, t, labels)

    def tangent(self, x: Tensor, t: Tensor, path: Tensor, labels: Tensor | None) -> Tensor:
        """cos(t) sin(t) dF/dt along the direction `path` = dx/dt."""
        size = t.cos() * t.sin()
        if self.derivative == "forward":
            return jvp(lambda a, b: self.output(a, b, labels), (x, t), (expand(size, x) * path, size))[1]
        h = 1e-3
        ahead, behind = (self.output(x + sign * h * path, t + sign * h, labels) for sign in (1, -1))
        return expand(size, x) * (ahead - behind) / (2 * h)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x0, labels = batch.inputs, batch.labels if self.pair.classes else None
        if turn == "critic":
            return {"critic": self._critic_loss(x0, labels)}
        t = self._times(len(x0), self.mean, self.spread)
        x = Trig().diffuse(x0, torch.randn_like(x0), t)
        cos, sin = expand(t.cos(), x), expand(t.sin(), x)
        own = self.output(x, t, labels)
        with torch.no_grad():
            path = self.output(x, t, labels, self._teacher)
            warm = min(1.0, clock.step / self.warmup)
            held = own.detach()
            g = -(cos**2) * (held - path) - warm * (cos * sin * x + self.tangent(x, t, path, labels))
            g = g / (expand(g.flatten(1).norm(dim=1), g) + self.norm)
        spread = self.parts["variance"](t)
        error = (own - held - g).square().flatten(1).mean(1)
        terms = {"consistency": ((-spread).exp() * error / t.tan() + spread).mean()}
        if self.adversarial:
            with frozen(self.parts["heads"]):
                made, now, named = self._second_pass(x0, labels)
                self.show(made, named)
                terms["adversarial"] = self.adversarial * fooling_loss(self._say(made, now, named), "hinge")
                self._made = (made.detach(), named)
        return terms

    def _second_pass(self, x0: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        t = self._times(len(x0), self.mean, self.spread)
        t = torch.where(torch.rand(len(x0), device=x0.device) < self.largest, torch.full_like(t, math.pi / 2), t)
        made = self._student.x0(Trig().diffuse(x0, torch.randn_like(x0), t), t, labels)
        return made, self._times(len(x0), self.mean_critic, self.spread_critic), labels

    def _say(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        features, _ = self._teacher.features(Trig().diffuse(x, torch.randn_like(x), t), t, labels)
        return self.parts["heads"](features, labels)

    def _critic_loss(self, x0: Tensor, labels: Tensor | None) -> Tensor:
        made, named = self._made
        t = self._times(len(x0), self.mean_critic, self.spread_critic)
        with torch.no_grad():  # the teacher's body is no part of the critic: only heads learn
            real, fake = self._features(x0, t, labels), self._features(made, t, named)
        heads = self.parts["heads"]
        said = heads(fake, named)
        if self.misaligned and labels is not None:
            other = labels.roll(1)
            wrong = other != labels
            with torch.no_grad():
                rolled = [f[wrong] for f in self._features(x0, t, other)]
            if bool(wrong.any()):
                said = torch.cat([said, heads(rolled, other[wrong])])
        return 0.5 * critic_loss(heads(real, labels), said, "hinge")

    def _features(self, x: Tensor, t: Tensor, labels: Tensor | None) -> list[Tensor]:
        return self._teacher.features(Trig().diffuse(x, torch.randn_like(x), t), t, labels)[0]
