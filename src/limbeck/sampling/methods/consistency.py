"""Consistency distillation: every point of a path is mapped to the path's end."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, expand
from limbeck.engine.clock import Clock
from limbeck.losses import pseudo_huber
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.trajectories import solver_step


def consistency_function(denoiser: Denoiser, x: Tensor, t: Tensor, labels: Tensor | None, sigma_data: float = 0.5) -> Tensor:
    """f(x, t) `(B, ...)`, the identity where the noise ends.

    Flow, v, noise and preconditioned networks have that boundary by themselves; a network that predicts x0 gets the skip c_skip = sd^2 /
    (r^2 + sd^2) of Song et al. 2023 (arXiv:2303.01469, appendix C) in r = sigma/alpha.
    """
    x0 = denoiser.x0(x, t, labels)
    if denoiser.prediction != "x0":
        return x0
    process = denoiser.process
    alpha = expand(process.alpha(t), x).clamp_min(1e-4)
    skip = sigma_data**2 / ((expand(process.sigma(t), x) / alpha) ** 2 + sigma_data**2)
    return skip * x / alpha + (1 - skip) * x0


@dataclass
class Consistency(FewStep):
    """Neighbouring points of the teacher's path must be mapped to the same clean sample.

    t_(n+1) > t_n on a grid, x at t_(n+1) from a real picture and noise, x' at t_n by one step of the teacher's solver:
    L = d(f(x, t_(n+1)), sg f_target(x', t_n)), f_target a moving average of the student.
    """

    card = Card(
        id="consistency",
        title="Consistency Models",
        year=2023,
        wing="sampling",
        family="trajectory",
        claim="One-step FID 3.55 on CIFAR-10 and 6.20 on ImageNet-64 by distillation, better with more steps.",
        equation="L = d(f(x_{t+1}, t+1), sg f_ema(Phi(x_{t+1}), t))",
        arxiv="2303.01469",
        baseline="fewer-steps",
        certainty="paper-text",
        deviations=(
            "pseudo-Huber distance of the authors' later work in place of LPIPS; no catalogue entry: the card is written from the paper"
        ),
    )
    contract = {"intervals": 8}

    intervals: int = setting(18, "grid points between data and noise (paper: 18 on CIFAR-10, 40 on ImageNet)", at_least=2)
    order: int = setting(2, "of the teacher's solver: 1 DDIM, 2 Heun (paper: 2)", choices=(1, 2))
    target: float = setting(
        0.95, "decay of the target network (paper: 0 on CIFAR-10 with 0.95 as the schedule's start)", at_least=0, at_most=0.9999
    )
    distance: str = setting("huber", "of two clean samples", choices=("huber", "mse"))

    def setup(self, pair: Pair) -> None:
        self.parts["target"] = copy.deepcopy(pair.student.network).requires_grad_(False)
        self._target = pair.student.with_network(self.parts["target"])
        self._grid = pair.student.process.times(self.intervals, "uniform", device=pair.device)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        pair, x0 = self.pair, batch.inputs
        assert pair.teacher is not None
        labels = batch.labels if pair.classes else None
        place = torch.randint(self.intervals, (len(x0),), device=x0.device)
        t, s = self._grid[place], self._grid[place + 1]
        x = pair.student.process.diffuse(x0, torch.randn_like(x0), t)
        made = self.show(consistency_function(pair.student, x, t, labels), labels)
        with torch.no_grad():
            near = solver_step(pair.teacher, x, t, s, labels, self.order)
            end = expand(pair.student.process.sigma(s), x0) < 1e-6  # where the noise ends, f is the identity exactly
            aim = torch.where(end, near, consistency_function(self._target, near, s, labels))
        error = made - aim
        value = pseudo_huber(error).mean() if self.distance == "huber" else error.square().mean()
        return {"consistency": value}

    def after_step(self, clock: Clock) -> None:
        with torch.no_grad():
            for own, new in zip(self.parts["target"].parameters(), self.pair.student.network.parameters()):
                own.lerp_(new, 1 - self.target)

    def figures(self, generator: Generator) -> dict[str, float]:
        return {"endpoint_error": self.endpoint_error(generator)}
