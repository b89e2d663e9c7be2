"""AST: smooth and strong experts, and a student that is less sensitive to where it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.condensation.experts import Schooling
from limbeck.condensation.methods.trajectory_matching import TrajectoryMatching
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.condensation.unrolling import trajectory_distance, unroll
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import Card, setting


def balance(begin: int, last: int) -> float:
    """What the inner loss is multiplied by at start epoch t = `begin`: log_5(t - h + 8), or 1 / log_5(h - t + 8) below h = last // 2."""
    half = last // 2
    return math.log(begin - half + 8, 5) if begin >= half else 1 / math.log(half - begin + 8, 5)


@dataclass
class AST(TrajectoryMatching):
    """Trajectory matching with momentum experts that are slowed where they move most, and a steadier student.

    Experts: momentum, weight decay, a loss that counts 0.5 to 0.95 in the first ten epochs, and a penalty of the input gradient. Student:
    starts at w + alpha (z / |z|) w (convolutions only), inner loss times a factor of the start epoch, heavy-ball steps, and the distance
    to intermediate epochs t + i after N / M * i steps as further terms. Images start at the nearest to k-means centres.
    """

    card = Card(
        id="ast-smooth-expert",
        title="Efficient dataset distillation through alignment with smooth and high-quality expert trajectories",
        year=2023,
        wing="condensation",
        family="trajectory",
        claim="Smooth, high-quality experts outperform earlier trajectory matching on data sets of different scales.",
        equation="L = |w_N - w*_{t+M}|^2 / |w~_t - w*_{t+M}|^2 + sum_i beta_i |w_{N i / M} - w*_{t+i}|^2 / |w~_t - w*_{t+i}|^2",
        arxiv="2310.10541",
        baseline="trajectory-matching",
        deviations=(
            "One image a cluster and class (the released code makes ten clusters whatever the budget). With one channel the gradient "
            "penalty takes the norm over the whole picture."
        ),
    )
    contract = {**TrajectoryMatching.contract, "clipping": 2, "init": "real"}

    init: str = setting("kmeans", "where the images start (paper: representative, by k-means)", choices=("kmeans", "real", "noise"))
    expert_lr: float = setting(0.003, "learning rate of the experts (paper: 0.003)", above=0)
    expert_momentum: float = setting(0.9, "momentum of the experts (paper: 0.9)", at_least=0, at_most=0.999)
    expert_decay: float = setting(1e-3, "weight decay of the experts (paper: 1e-3)", at_least=0)
    clipping: int = setting(10, "epochs in which the experts' loss counts less (paper: 10)", at_least=0)
    penalty: float = setting(2.0, "weight of the experts' input-gradient penalty (paper: 2)", at_least=0)
    drop: float = setting(
        0.6, "the experts' learning rate is multiplied by this after half of their epochs (paper: 0.6)", above=0, at_most=1
    )
    inner_momentum: float = setting(0.9, "momentum of the inner steps (paper: 0.9)", at_least=0, at_most=0.999)
    perturbation: float = setting(1.0, "alpha of the start weights (paper: 1)", at_least=0)
    balanced: bool = setting(True, "scale the inner loss by the start epoch (paper: yes)")
    intermediate: str = setting("adaptive", "weights of intermediate epochs: 1, i / M, or none", choices=("agg", "adaptive", "none"))

    def schooling(self) -> Schooling:
        return replace(super().schooling(), clipping=self.clipping, penalty=self.penalty, drop=self.drop)

    def prepare(self, problem: Problem) -> None:
        if self.memory_use == "constant":
            raise UserError(
                f"{self.card.id} cannot use memory_use=constant: momentum and intermediate epochs need the whole unrolled student",
                "set memory_use=full, or use trajectory-matching",
            )
        if self.intermediate != "none" and self.syn_steps < self.expert_epochs:
            raise UserError(
                f"{self.card.id}: {self.syn_steps} inner steps cannot stand for {self.expert_epochs} epochs with a match after each",
                "raise method.syn_steps, or set method.intermediate=none",
            )
        super().prepare(problem)

    def perturbed(self, weights: Tensor) -> Tensor:
        """`(P,)`: weights whose convolutions were moved by alpha (z / |z|_F) w, z standard normal."""
        if not self.perturbation:
            return weights
        parts = []
        for part in self._functional.unflatten(weights).values():
            if part.ndim == 4:
                z = torch.randn_like(part)
                part = part + self.perturbation * (z / z.norm()) * part
            parts.append(part.reshape(-1))
        return torch.cat(parts)

    def scale(self, begin: int) -> float:
        return balance(begin, self.max_start) if self.balanced else 1.0

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        path, begin = self.stretch(clock)
        start = self.perturbed(path[begin])
        assert set.lr is not None
        loss = self.step_loss(set, problem, begin)
        weights = unroll(loss, start, self.syn_steps, set.lr, self.inner_momentum)
        terms = {"trajectory": trajectory_distance(weights[-1], start, path[begin + self.expert_epochs])}
        if self.intermediate != "none" and self.expert_epochs > 1:
            between = torch.zeros((), device=start.device)
            for i in range(1, self.expert_epochs):
                share = 1.0 if self.intermediate == "agg" else i / self.expert_epochs
                at = weights[self.syn_steps // self.expert_epochs * i]
                between = between + share * trajectory_distance(at, start, path[begin + i])
            terms["intermediate"] = between
        return terms

    def figures(self, set: SyntheticSet, problem: Problem) -> dict[str, float]:
        return super().figures(set, problem) | {"largest_step": largest_step(self)}


def largest_step(method: TrajectoryMatching, most: int = 6) -> float:
    """Mean over experts of the greatest distance between the weights of two consecutive epochs: how fast they move where they move most."""
    found = [(path[1:] - path[:-1]).norm(dim=1).max() for path in map(method._buffer.trajectory, range(min(most, len(method._buffer))))]
    return float(torch.stack(found).mean())
