"""PSO: tuning a distilled generator by pairs of its own samples, without undoing its few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, expand
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.rewards import make_reward


def step_log_density(made: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`(B,)` mean over pixels of log N(made; alpha x0, sigma^2): how likely a stochastic sampler's step is.

    Args:
        made: the next state `(B, ...)` as it was drawn. x0: the network's clean prediction. alpha, sigma: `(B,)` at the next time.
    """
    s = expand(sigma, made)
    value = -((made - expand(alpha, made) * x0) ** 2) / (2 * s * s) - s.log() - 0.5 * math.log(2 * math.pi)
    return value.flatten(1).mean(1)


@dataclass
class PSO(FewStep):
    """Two samples of one class are drawn by the generator's own re-noising steps; the better one's steps are made relatively likelier.

    rho_j = clip(p(x'_j | x_j) / p_ref(x'_j | x_j), 1 - e, 1 + e), L = -log sigmoid(beta (s_0 log rho_0 + s_1 log rho_1)), s = +1 for the
    better, -1 for the worse, 0 where neither is in every reward. What both share, the few-step map, is left alone. `objective="sft"` is
    plain denoising of the better samples, which destroys that map. The student must be distilled already (`student.train` or a
    generator's folder).
    """

    card = Card(
        id="pso",
        title="Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
        year=2024,
        wing="sampling",
        family="after distillation",
        claim="Adapts distilled models to preferences, styles and concepts directly, keeping their few steps.",
        equation="L = -log sigmoid(beta (s_0 log rho_0 + s_1 log rho_1)),  rho = clip(p/p_ref, 1-e, 1+e)",
        arxiv="2410.03190",
        baseline="",
        deviations="online form; pairs are drawn anew in every step instead of once an epoch, and"
        " the sampler's steps are trained together; the offline form needs target pictures and is not here",
    )
    data_free = True
    needs_teacher = False
    contract = {"reward": "ink"}

    reward: str = setting("ink", "what is better: ink (mean pixel), or python:package.module:function (paper: PickScore)")
    beta: float = setting(50.0, "sharpness of the preference (paper: 50)", above=0)
    clip: float = setting(0.1, "e of the ratio (paper: 0.1)", above=0, at_most=1)
    rank: int = setting(0, "of low-rank adapters (paper: 16); 0 trains the whole network", at_least=0)
    objective: str = setting("pso", "pso, or sft: plain denoising of the better samples", choices=("pso", "sft"))

    def bind(self, pair: Pair) -> None:
        super().bind(pair)
        if max(pair.spec.steps) < 2:
            raise UserError("pso tunes the noisy steps of a sampler, and one step has none", "set generate.steps to 2 or more")

    def setup(self, pair: Pair) -> None:
        self._reference = pair.copy_of_student()
        self._reward = make_reward(self.reward, pair)
        self._times = pair.student.process.times(max(pair.spec.steps), "uniform", device=pair.device)[:-1]
        if self.rank:
            from limbeck.sampling.adapters import add_lora

            pair.student.network = add_lora(pair.student.network, self.rank).to(pair.device)

    @torch.no_grad()
    def _roll(self, labels: Tensor | None, count: int) -> tuple[list[Tensor], Tensor]:
        """States of a sampler's run, and its result."""
        pair, student = self.pair, self.pair.student
        process = student.process
        x = process.scale(self._times[:1]) * pair.noise(count)
        states = [x]
        for number, time in enumerate(self._times):
            made = student.x0(x, time.expand(count), labels)
            if number + 1 < len(self._times):
                x = process.diffuse(made, pair.noise(count), self._times[number + 1].expand(count))
                states.append(x)
        return states, made

    def _ratio(self, states: list[Tensor], number: int, labels: Tensor | None) -> Tensor:
        process = self.pair.student.process
        t, s = (self._times[n].expand(len(states[0])) for n in (number, number + 1))
        alpha, sigma = process.alpha(s), process.sigma(s)
        own = step_log_density(states[number + 1], self.pair.student.x0(states[number], t, labels), alpha, sigma)
        with torch.no_grad():
            before = step_log_density(states[number + 1], self._reference.x0(states[number], t, labels), alpha, sigma)
        return (own - before).exp().clamp(1 - self.clip, 1 + self.clip)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        pair, count = self.pair, self.batch_size
        labels = pair.labels(count)
        (first, made0), (second, made1) = self._roll(labels, count), self._roll(labels, count)
        r0, r1 = (self._reward(made).reshape(count, -1) for made in (made0, made1))
        sign = (r0 > r1).all(1).float() - (r0 < r1).all(1).float()
        self.made = made0
        if self.objective == "sft":
            better = torch.where((sign >= 0).reshape(-1, *(1,) * (made0.ndim - 1)), made0, made1)
            t = pair.student.process.draw(count, device=pair.device)
            return {"denoising": pair.student.denoising_loss(better, torch.randn_like(better), t, labels)}
        values = []
        for number in range(len(self._times) - 1):
            gain = sign * (self._ratio(first, number, labels).log() - self._ratio(second, number, labels).log())
            values.append(-F.logsigmoid(self.beta * gain).mean())
        return {"preference": torch.stack(values).mean()}

    def finish(self, student: Denoiser) -> Generator:
        if self.rank:
            from limbeck.sampling.adapters import merge_lora

            student = student.with_network(merge_lora(student.network))
        return super().finish(student)

    def figures(self, generator: Generator) -> dict[str, Any]:
        """Mean reward of its samples at its greatest number of steps, and of the generator that it started from."""
        steps = max(self.pair.spec.steps)
        before = Generator(self._reference, self.pair.pictures.shape)
        return {
            "reward": float(self._reward(generator.sample(500, steps, self.pair.seed)).mean()),
            "reward_before": float(self._reward(before.sample(500, steps, self.pair.seed)).mean()),
        }
