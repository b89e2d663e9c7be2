"""INFER: one additive pattern shared by real images of all classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.condensation.methods.sre2l import SRe2L
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import Card, setting


@dataclass
class INFER(SRe2L):
    """A few real images of each class, and for each set of them and each network one pattern that is added to all classes.

    L(u) = CE(T_m(roll(X_k + u)), y) + statistics * BN, X_k one real image of every class. A pattern costs one stored image and gives a new
    training image of every class, so a budget of `per_class` images buys int(per_class / (M / K + 1)) real ones a class and as many
    times M patterns. Labels are the mean logits of all networks, once for each image (static) and interpolated under mixup.
    """

    card = Card(
        id="infer",
        title="Breaking class barriers: efficient dataset distillation via inter-class feature compensator",
        year=2024,
        wing="condensation",
        family="inversion",
        claim="Patterns shared by all classes use the budget better, and static labels take almost no space.",
        equation="S = {X_k} + {X_k + u_{k,m}},  L(u) = CE(T_m(X_k + u), y) + r BN",
        arxiv="2408.06927",
        baseline="random-real",
        deviations="X + u is not clamped to the range of pixels: images and patterns are stored apart.",
    )
    contract = {"label_epochs": 2, "jitter": 1}

    init: str = setting("real", "where the images come from (paper: real)", choices=("real", "kmeans"))
    statistics: float = setting(1.0, "weight of the BatchNorm statistics (paper: 1 on CIFAR, 0.01 on ImageNet)", at_least=0)
    crop: bool = setting(False, "look at random parts of the images (paper: not on CIFAR)")
    patterns: bool = setting(True, "buy patterns; else the budget buys real images alone (the baseline at equal storage)")
    dynamic: bool = setting(False, "store labels of every epoch instead of one label for each image")
    mix: str = setting("mixup", "how students mix samples (paper: mixup)", choices=("mixup", "cutmix", "none"))
    alpha: float = setting(0.8, "of the mix (paper: 0.8)", above=0)
    temperature: float = setting(30.0, "T of the students' KL (paper: 30)", above=0)

    def used(self, problem: Problem) -> list[str]:
        return super().used(problem) if self.member else list(problem.teachers)

    def begin(self, problem: Problem) -> SyntheticSet:
        members, classes = len(self.used(problem)), problem.classes
        if not self.patterns:
            return problem.initial(self.init)
        real = int(problem.per_class / (members / classes + 1))
        if real < 1:
            raise UserError(
                f"{problem.per_class} image(s) a class do not pay for one real image and {members} patterns of one image each",
                f"set condense.per_class to at least {int(members / classes + 1) + 1}, or name fewer teachers",
            )
        images = problem.initial(self.init, real).images.detach()
        compose = [
            (c * real + k, pattern)
            for c in range(classes)
            for k in range(real)
            for pattern in [-1, *(k * members + m for m in range(members))]
        ]
        patterns = torch.zeros(real * members, *images.shape[1:], device=images.device)
        return problem.make(images, problem.labels(real), patterns=patterns, compose=torch.tensor(compose, device=images.device))

    def learnt(self, set: SyntheticSet) -> nn.Parameter:
        assert set.patterns is not None
        return set.patterns

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        return super().optimizers(set) if self.patterns else {}

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        by_group = set.images.detach().unflatten(0, (problem.classes, -1))
        assert set.patterns is not None
        readers = list(self._readers.values())
        batches = [
            (by_group[:, k] + set.patterns[k * len(readers) + m], [(reader, 1.0)])
            for k in range(by_group.shape[1])
            for m, reader in enumerate(readers)
        ]
        return self._terms(batches, clock)

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        """Patterns are free: only what is added up would have to be a picture."""

    def relabelled(self, set: SyntheticSet, problem: Problem) -> SyntheticSet:
        if self.dynamic:
            return super().relabelled(set, problem)
        made = set.copy()
        with torch.no_grad():
            made.logits = nn.Parameter(self.labels(made.decode()[0], problem))
        mix = None if self.mix == "none" else self.mix
        made.how = {**made.how, "loss": "kl", "temperature": self.temperature, "mix": mix, "alpha": self.alpha}
        return made

    def labels(self, x: Tensor, problem: Problem) -> Tensor:
        return torch.stack([problem.teachers[name](x) for name in self.used(problem)]).mean(0)
