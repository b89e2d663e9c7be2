"""A feature extractor that never saw a label: Barlow Twins on two augmented views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from limbeck import schema
from limbeck.condensation.problem import Problem
from limbeck.condensation.students import Lesson, Lessons
from limbeck.data.augment import Augment
from limbeck.data.batches import own_randomness
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram
from limbeck.losses.kernel import barlow_twins

VIEWS = ("shift:1", "rotate:15", "scale:0.2", "noise:0.1")
"""How two views of a picture are made (amounts for small pictures; nothing is mirrored)."""


class BarlowProgram(PlainProgram):
    """Trains a network without labels, as an engine program (Zbontar et al. 2021, arXiv:2103.03230).

    Args:
        network: gives features `(B, d)`; what is kept.
        positions: `(N,)` of the training samples that are used.
        problem: the real data.
        epochs, batch, lr: AdamW along a cosine.
        views: changes of the pictures; samples that are no pictures get normal noise.
    """

    def __init__(
        self, network: nn.Module, width: int, positions: Tensor, problem: Problem, epochs: float, batch: int, lr: float, seed: int
    ) -> None:
        self.network, self.positions, self.problem = network, positions, problem
        with own_randomness(seed, 61):
            self.projector = nn.Sequential(
                nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * width)
            ).to(problem.device)
        take = lambda index: problem.at(positions[index.cpu()])  # noqa: E731
        self.lessons = Lessons(take, torch.zeros(len(positions), dtype=torch.long, device=problem.device), batch, seed=seed)
        self.steps_per_epoch = self.lessons.steps_per_epoch
        self.training = schema.Training(epochs=epochs, optimizer="adamw", lr=lr, schedule="cosine", warmup=0.1)
        self.total = max(1, round(epochs * self.steps_per_epoch))
        self.augment = Augment(VIEWS) if problem.images else None

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "projector": self.projector}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        from limbeck.engine.schedule import make_optimizer

        return {"network": make_optimizer(self.training, [*self.network.parameters(), *self.projector.parameters()])}

    def batches(self, epoch: int, start: int) -> Iterator[Lesson]:
        return self.lessons.epoch(epoch, start)

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("network",)

    def _view(self, x: Tensor) -> Tensor:
        return self.augment(x) if self.augment is not None else x + 0.1 * torch.randn_like(x)

    def losses(self, turn: str, batch: Lesson, clock: Clock) -> dict[str, Tensor]:
        first, second = (self.projector(self.network(self._view(batch.x))) for _ in range(2))
        return {"redundancy": barlow_twins(first, second)}
