"""Gradient matching (DC) and, with a siamese augmentation, DSA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.functional import Functional
from limbeck.condensation.matching import part_by_part, synthetic_classes
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.clock import Clock
from limbeck.losses.matching import METRICS, gradient_distance
from limbeck.method import Card, setting

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""(outer, inner) loops by images a class, as in the released code."""


@dataclass
class GradientMatching(Condenser):
    """The gradient that a network gets from the synthetic samples of a class must be the one it gets from real ones.

    L = sum_c D( grad mean CE(f(A(S_c)), c), grad mean CE(f(A(R_c)), c) ), D a sum over output rows of 1 - cosine; along the training
    of many random networks on the synthetic set. A is the identity (DC) or the recipe's `condense.siamese` (DSA).
    """

    card = Card(
        id="gradient-matching",
        title="Dataset condensation with gradient matching; with differentiable siamese augmentation",
        year=2020,
        wing="condensation",
        family="gradient",
        claim="One image a class learnt by gradient matching trains a network far better than one real image a class.",
        equation="L = sum_c sum_rows 1 - cos(grad_s, grad_r)",
        arxiv="2006.05929",
        baseline="random-real",
        deviations="iterations counts updates of the images: the papers' 1000 networks times `outer_loop` updates for each.",
    )
    needs_norm = "no-batch"
    contract = {"batch_real": 8, "outer_loop": 2, "inner_loop": 1}

    iterations: int = setting(1000, "updates of the images (paper: 1000 networks times outer_loop)", at_least=1)
    init: str = setting("noise", "where the images start (DC: noise, DSA: real)", choices=("noise", "real", "kmeans"))
    lr_images: float = setting(0.1, "learning rate of the images (paper: 0.1)", above=0)
    momentum: float = setting(0.5, "of the images' SGD (paper: 0.5)", at_least=0, at_most=0.999)
    batch_real: int = setting(256, "real samples of each class in a step (paper: 256)", at_least=1)
    outer_loop: int = setting(0, "updates of the images for each network; 0: the paper's table by images a class", at_least=0)
    inner_loop: int = setting(0, "epochs that the network learns between two updates; 0: the paper's table", at_least=0)
    lr_network: float = setting(0.01, "learning rate of the network inside (paper: 0.01)", above=0)
    batch_inner: int = setting(256, "batch of the network inside (paper: 256)", at_least=1)
    metric: str = setting("rows", "distance of gradients (paper: rows)", choices=METRICS)

    def prepare(self, problem: Problem) -> None:
        nearest = min(LOOPS, key=lambda n: abs(n - problem.per_class))
        self._outer = self.outer_loop or LOOPS[nearest][0]
        self._inner = self.inner_loop or LOOPS[nearest][1]
        self._network: nn.Module = problem.network()
        self._functional = Functional(self._network)

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        return {"set": torch.optim.SGD([set.images], self.lr_images, self.momentum)}

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        if clock.step % self._outer == 0:
            self._network = problem.network(self._network)
        weights = list(self._network.parameters())
        viewed = synthetic_classes(set, problem, self.views)

        def distance(synthetic: Tensor, c: int) -> Tensor:
            real = problem.real(c, self.batch_real)
            if problem.siamese is not None:
                synthetic, real = problem.siamese.pair(synthetic, real)
            wanted = torch.autograd.grad(self._cross_entropy(real, c), weights)
            found = torch.autograd.grad(self._cross_entropy(synthetic, c), weights, create_graph=True)
            return gradient_distance(found, wanted, self.metric)

        return {"gradients": part_by_part(torch.cat(viewed), [len(x) for x in viewed], distance)}

    def _cross_entropy(self, x: Tensor, c: int) -> Tensor:
        return F.cross_entropy(self._network(x), torch.full((len(x),), c, device=x.device))

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        """Let the network learn from the present set, detached, before the next update of the images."""
        if (clock.step + 1) % self._outer == 0:
            return
        optimizer = torch.optim.SGD(self._network.parameters(), self.lr_network)
        x, y = set.decode()
        x = x.detach()  # the network's training must leave no gradient on the images
        for _ in range(self._inner):
            for index in torch.randperm(len(x)).split(self.batch_inner):
                index = index.to(x.device)
                batch = self.views(x[index])
                labels = y[index].repeat(len(batch) // len(index))
                if problem.siamese is not None:
                    batch = problem.siamese(batch)
                optimizer.zero_grad()
                F.cross_entropy(self._network(batch), labels).backward()
                optimizer.step()

    def memory(self) -> dict[str, Any]:
        return {"network": self._functional.flatten(self._network)}

    def restore(self, memory: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._network.parameters(), self._functional.unflatten(memory["network"]).values()):
                parameter.copy_(value)
