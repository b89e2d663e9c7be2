"""Trajectory matching (MTT), with TESLA's constant memory as a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.condensation.condenser import Condenser, surrogate
from limbeck.condensation.experts import Buffer, Schooling
from limbeck.condensation.problem import Problem
from limbeck.condensation.siamese import Draw
from limbeck.condensation.students import lesson_loss
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.condensation.unrolling import constant_memory_gradient, train, trajectory_distance, unroll
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import Card, setting

LEAST_RATE = 1e-6
"""A learnt rate is kept above this; each time it had to be is counted and reported."""


@dataclass
class TrajectoryMatching(Condenser):
    """A student that starts at an expert's weights and learns from the set must arrive where the expert was M epochs later.

    L = |w_N - w*_{t+M}|^2 / |w*_t - w*_{t+M}|^2, w_{k+1} = w_k - a grad CE(f(A(x_k); w_k), y_k), w_0 = w*_t; the images and the rate a
    are learnt. `memory: constant` computes the gradient one inner step at a time (TESLA).
    """

    card = Card(
        id="trajectory-matching",
        title="Dataset distillation by matching training trajectories; with constant memory (TESLA)",
        year=2022,
        wing="condensation",
        family="trajectory",
        claim="Matching long stretches of training instead of single steps gives far better sets than gradient or distribution matching.",
        equation="L = |w_N - w*_{t+M}|^2 / |w*_t - w*_{t+M}|^2",
        arxiv="2203.11932",
        baseline="random-real",
        deviations=(
            "The constant-memory gradient has its true factor 2; TESLA's code has half of it. The learnt rate is kept above 1e-6. "
            "Experts are drawn independently instead of in shuffled rounds."
        ),
    )
    needs_norm = "no-batch"
    inner_momentum = 0.0
    contract = {
        "experts": 2,
        "epochs": 3,
        "expert_batch": 64,
        "expert_lr": 0.05,
        "syn_steps": 3,
        "expert_epochs": 2,
        "max_start": 2,
        "lr_images": 5,
    }

    iterations: int = setting(5000, "outer steps (paper: 5000)", at_least=1)
    syn_steps: int = setting(20, "N, inner steps on the synthetic samples (code's default: 20)", at_least=1)
    expert_epochs: int = setting(3, "M, epochs of the expert that they stand for (code's default: 3)", at_least=1)
    min_start: int = setting(0, "first epoch of an expert from which a student may start", at_least=0)
    max_start: int = setting(25, "students start before this epoch (code's default: 25)", at_least=1)
    batch_syn: int = setting(0, "synthetic samples in an inner step; 0: all of them (paper)", at_least=0)
    lr_images: float = setting(100.0, "learning rate of the images (paper: 100 to 1000 on 32 pixels)", above=0)
    momentum: float = setting(0.5, "of the SGD of images and rate (paper: 0.5)", at_least=0, at_most=0.999)
    rate: float = setting(0.01, "a, the inner learning rate at the beginning (paper: 0.01)", above=0)
    lr_rate: float = setting(1e-5, "learning rate of a (paper: 1e-7 to 1e-5)", at_least=0)
    memory_use: str = setting(
        "full", '"full": back through all inner steps; "constant": one at a time (TESLA)', choices=("full", "constant")
    )
    experts: int = setting(100, "how many experts (paper: 100)", at_least=1)
    epochs: int = setting(50, "epochs of each expert (paper: 50)", at_least=1)
    expert_lr: float = setting(0.01, "learning rate of the experts (paper: 0.01)", above=0)
    expert_batch: int = setting(256, "batch of the experts (paper: 256)", at_least=1)
    expert_momentum: float = setting(0.0, "momentum of the experts (paper: 0)", at_least=0, at_most=0.999)
    expert_decay: float = setting(0.0, "weight decay of the experts (paper: 0)", at_least=0)

    def schooling(self) -> Schooling:
        """How the experts are trained."""
        return Schooling(self.experts, self.epochs, self.expert_batch, self.expert_lr, self.expert_momentum, self.expert_decay)

    def prepare(self, problem: Problem) -> None:
        if self.max_start <= self.min_start:
            raise UserError(f"{self.card.id}: max_start {self.max_start} is not above min_start {self.min_start}", "give a wider window")
        if self.max_start - 1 + self.expert_epochs > self.epochs:
            raise UserError(
                f"{self.card.id}: epoch {self.max_start - 1} plus {self.expert_epochs} lies beyond the experts' {self.epochs} epochs",
                "lower method.max_start or method.expert_epochs, or raise method.epochs",
            )
        self._buffer = Buffer(problem, self.schooling()).make()
        self._functional = self._buffer.functional
        self._clamped, self._told = 0, 0

    def begin(self, problem: Problem) -> SyntheticSet:
        made = problem.initial(self.init)
        return self._with_rate(made, problem)

    def _with_rate(self, made: SyntheticSet, problem: Problem) -> SyntheticSet:
        made.lr = torch.nn.Parameter(torch.tensor(self.rate, device=problem.device))
        return made

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        groups: list[dict[str, Any]] = [{"params": [set.images], "lr": self.lr_images}, {"params": [set.lr], "lr": self.lr_rate}]
        return {"set": torch.optim.SGD(groups, momentum=self.momentum)}

    # ---- one outer step ----

    def starts(self, clock: Clock) -> tuple[int, int]:
        """First epoch from which a student may start, and the first from which it may not any more."""
        return self.min_start, self.max_start

    def stretch(self, clock: Clock) -> tuple[Tensor, int]:
        """A random expert's trajectory `(E + 1, P)`, and the epoch of it at which a student starts."""
        low, high = self.starts(clock)
        expert, begin = int(torch.randint(len(self._buffer), ())), int(torch.randint(low, high, ()))
        return self._buffer.trajectory(expert), begin

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        path, begin = self.stretch(clock)
        start, target = path[begin], path[begin + self.expert_epochs]
        loss = self.step_loss(set, problem, begin)
        assert set.lr is not None
        if self.memory_use == "constant":
            learnt = [set.images] + ([] if set.logits is None else [set.logits])
            value, rate, found = constant_memory_gradient(loss, start, target, self.syn_steps, set.lr, learnt)
            return {"trajectory": surrogate(value, {**dict(zip(learnt, found)), set.lr: rate})}
        weights = unroll(loss, start, self.syn_steps, set.lr)
        return {"trajectory": trajectory_distance(weights[-1], start, target)}

    def scale(self, begin: int) -> float:
        """What the inner loss is multiplied by when the student starts at epoch `begin`."""
        return 1.0

    def step_loss(self, set: SyntheticSet, problem: Problem, begin: int) -> Any:
        """The loss of inner step k on its batch; batches and augmentations are drawn here, once for all steps.

        Args:
            begin: the start epoch.
        """
        scale = self.scale(begin)
        count, size = len(set.images), self.batch_syn or len(set.images)
        order: list[Tensor] = []
        while len(order) < self.syn_steps:
            order += [part.to(problem.device) for part in torch.randperm(count).split(size)]
        draws: list[Draw | None] = [None if problem.siamese is None else problem.siamese.draw() for _ in range(self.syn_steps)]
        whole = size >= count

        def loss(weights: Tensor, k: int) -> Tensor:
            index = None if whole else order[k]
            x, y = set.decode(index)
            x = self.views(x)
            draw = draws[k]
            if draw is not None and problem.siamese is not None:
                x = problem.siamese.apply(x, draw)
            rows = y if set.logits is None else set.logits if index is None else set.logits[index]
            rows = rows.repeat(len(x) // len(rows), *([1] * (rows.ndim - 1)))
            return scale * lesson_loss(self._functional(weights, x), rows, "ce" if set.logits is None else "soft_ce")

        return loss

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        """The learnt rate stays positive."""
        with torch.no_grad():
            assert set.lr is not None
            self._clamped = self._clamped + (set.lr < LEAST_RATE).long()
            set.lr.clamp_(min=LEAST_RATE)

    def alarms(self) -> list[str]:
        clamped = int(self._clamped)
        if clamped == self._told:
            return []
        self._told = clamped
        return ["the learnt learning rate turned negative and was kept at 1e-6: lower method.lr_rate or method.lr_images"]

    def memory(self) -> dict[str, Any]:
        return {"clamped": int(self._clamped)}

    def restore(self, memory: Mapping[str, Any]) -> None:
        self._clamped = self._told = int(memory["clamped"])

    # ---- what it came to ----

    def matching_loss(self, set: SyntheticSet, problem: Problem, most: int = 6) -> float:
        """Mean trajectory distance over experts and start epochs of the window, without augmentation."""
        found = []
        for expert in range(min(most, len(self._buffer))):
            path = self._buffer.trajectory(expert)
            for begin in range(self.min_start, self.max_start):
                end = self._follow(set, problem, path[begin], begin)
                found.append(trajectory_distance(end, path[begin], path[begin + self.expert_epochs]))
        return float(torch.stack(found).mean())

    def _follow(self, set: SyntheticSet, problem: Problem, start: Tensor, begin: int) -> Tensor:
        assert set.lr is not None
        siamese, problem.siamese = problem.siamese, None
        try:
            return train(self.step_loss(set, problem, begin), start, self.syn_steps, set.lr, self.inner_momentum)
        finally:
            problem.siamese = siamese

    def accumulated_error(self, set: SyntheticSet, problem: Problem, segments: int = 3, most: int = 6) -> float:
        """Trajectory distance at the end of several stretches in a row, each beginning where the student ended the one before."""
        found = []
        for expert in range(min(most, len(self._buffer))):
            path = self._buffer.trajectory(expert)
            last = min(segments, (len(path) - 1 - self.min_start) // self.expert_epochs)
            student = path[self.min_start]
            for segment in range(last):
                student = self._follow(set, problem, student, self.min_start + segment * self.expert_epochs)
            found.append(trajectory_distance(student, path[self.min_start], path[self.min_start + last * self.expert_epochs]))
        return float(torch.stack(found).mean())

    def figures(self, set: SyntheticSet, problem: Problem) -> dict[str, float]:
        """The learnt rate, and the mean trajectory distance of the finished set and of random real images."""
        assert set.lr is not None
        found = {"learnt_rate": float(set.lr.detach()), "matching_loss": self.matching_loss(set, problem)}
        if set.logits is None:
            before = problem.initial("real")
            before.lr = set.lr
            found["matching_loss_before"] = self.matching_loss(before, problem)
        return found
