"""Fresh networks trained on a set: several at once, because a set is small and a network's own work then hides nothing.

Students of one call share the order of samples and the augmentation and differ in their first weights and learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from limbeck.condensation import mixing
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.data.augment import Augment
from limbeck.data.choose import generator
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Loop, Plan
from limbeck.engine.program import PlainProgram
from limbeck.losses import cross_entropy

if TYPE_CHECKING:
    from limbeck.condensation.problem import Problem

STACKED_BATCH = 64
"""Up to this batch a forward pass of all students together (vmap) is faster on a CPU than one after the other; measured, see docs."""


@dataclass
class Lesson:
    """One batch: `x` `(B, ...)` and what it should be called: classes `(B,)`, or a row of logits or targets for each sample."""

    x: Tensor
    y: Tensor
    index: Tensor | None = None


class Lessons:
    """The batches of a synthetic set, or of real samples, epoch after epoch; the order is a pure function of (seed, epoch).

    Args:
        x: `(N, ...)` samples, or a function that reads those at positions `(B,)`.
        y: `(N,)` classes, `(N, K)` logits or `(N, d)` targets.
        batch: samples in a batch; a set that is smaller is one batch.
        augment: random changes of pictures, drawn anew for each batch.
        mix, alpha: "mixup" or "cutmix": inputs are mixed and rows of `y` interpolated (classes become one-hot rows first).
        seed: of the order.
    """

    def __init__(
        self,
        x: Tensor | Callable[[Tensor], Tensor],
        y: Tensor,
        batch: int,
        augment: Sequence[str] = (),
        mix: str | None = None,
        alpha: float = 0.8,
        seed: int = 0,
    ) -> None:
        self.take = x if callable(x) else lambda index: x[index]
        self.y, self.batch, self.mix, self.alpha, self.seed = y, min(batch, len(y)), mix, alpha, seed
        self.augment = Augment(augment) if augment else None

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; a last incomplete one is left out."""
        return max(1, len(self.y) // self.batch)

    def epoch(self, epoch: int, start: int) -> Iterator[Lesson]:
        """The batches of an epoch from number `start` on."""
        whole = self.steps_per_epoch == 1
        order = torch.arange(len(self.y)) if whole else torch.randperm(len(self.y), generator=generator(self.seed, epoch))
        for step in range(start, self.steps_per_epoch):
            index = order[step * self.batch : (step + 1) * self.batch].to(self.y.device)
            x, y = self.take(index), self.y[index]
            if self.augment is not None:
                x = self.augment(x)
            if self.mix:
                x, y = mixing.mix_pairs(self.mix, x, y, self.alpha)
            yield Lesson(x, y, index)


class Replayed(Lessons):
    """The stored views of a set and the labels that were stored for them, over and over."""

    def __init__(self, set: SyntheticSet, batch: int) -> None:
        assert set.view_logits is not None
        self.set, self.batch = set, min(batch, len(set))
        self.y = set.view_logits[0]

    def epoch(self, epoch: int, start: int) -> Iterator[Lesson]:
        """The batches of view `epoch` modulo the number of stored ones."""
        epoch %= len(self.set.view_logits)
        x, _ = self.set.view(epoch)
        y = self.set.view_logits[epoch].float()
        for step in range(start, self.steps_per_epoch):
            own = slice(step * self.batch, (step + 1) * self.batch)
            yield Lesson(x[own], y[own])


def real_lessons(problem: Problem, batch: int, augment: Sequence[str] = (), seed: int = 0) -> Lessons:
    """The batches of all labelled real training samples, standardised and read when they are needed."""
    labels = problem.data.train.labels
    assert labels is not None
    y = labels.cpu()[problem.labelled].to(problem.device)
    return Lessons(lambda index: problem.at(problem.labelled[index.cpu()]), y, batch, augment, seed=seed)


def lessons(set: SyntheticSet, batch: int, augment: Sequence[str] = (), seed: int = 0) -> Lessons:
    """The batches that students of a set see, as its `how` says."""
    if set.view_logits is not None:
        return Replayed(set, batch)
    x, y, z = set.samples()
    rows = set.targets if set.targets is not None else z
    return Lessons(x.detach(), y if rows is None else rows.detach(), batch, augment, set.how["mix"], set.how["alpha"], seed)


def lesson_loss(logits: Tensor, y: Tensor, loss: str = "ce", temperature: float = 1.0) -> Tensor:
    """What a student minimises on one batch, a mean over samples.

    "ce" (classes or, after mixing, rows of probabilities), "soft_ce" (cross-entropy to softmax of the rows at a temperature), "kl"
    (KL(softmax(rows / T) || student at T), no T^2: the recipes of this literature leave it out), "mse" (squared error, mean over entries).

    Args:
        logits: `(B, K)`.
        y: `(B,)` classes or `(B, K)` rows.
    """
    if loss == "mse":
        return F.mse_loss(logits, y)
    if loss == "ce":
        return cross_entropy(logits, y, ignore=None) if y.ndim == 1 else -(y * logits.log_softmax(-1)).sum(-1).mean()
    target = (y / temperature).softmax(-1)
    said = (logits / temperature).log_softmax(-1)
    crossed = -(target * said).sum(-1).mean()
    return crossed if loss == "soft_ce" else crossed + torch.special.xlogy(target, target).sum(-1).mean()


class StudentsProgram(PlainProgram):
    """Several networks of one architecture that learn from the same lessons, as an engine program.

    Args:
        networks: at least one, in the state in which they begin.
        lessons: the batches.
        training: optimiser settings of a recipe.
        rates: learning rate of each network.
        how: `loss` and `temperature`, see `lesson_loss`.
    """

    def __init__(
        self, networks: Sequence[nn.Module], lessons: Lessons, training: Any, rates: Sequence[float], how: dict[str, Any] | None = None
    ) -> None:
        self.networks, self.lessons, self.training, self.rates = list(networks), lessons, training, list(rates)
        self.how = {"loss": "ce", "temperature": 1.0, **{k: v for k, v in (how or {}).items() if k in ("loss", "temperature")}}
        self.steps_per_epoch = lessons.steps_per_epoch
        self.total = training.steps or math.ceil(training.epochs * self.steps_per_epoch)
        first = self.networks[0]
        # buffers (BatchNorm) would have to be stacked and written back; such networks run one after the other
        self.stacked = len(networks) > 2 and lessons.batch <= STACKED_BATCH and not any(True for _ in first.buffers())
        self._named = [dict(network.named_parameters()) for network in self.networks]
        self._forward = vmap(lambda weights, x: functional_call(first, weights, (x,)), (0, None), randomness="different")

    def modules(self) -> dict[str, nn.Module]:
        return {f"student{number}": network for number, network in enumerate(self.networks)}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        from limbeck.engine.schedule import make_optimizer

        groups = [{"params": list(network.parameters()), "lr": rate} for network, rate in zip(self.networks, self.rates)]
        return {"student": make_optimizer(self.training, groups)}

    def batches(self, epoch: int, start: int) -> Iterator[Lesson]:
        return self.lessons.epoch(epoch, start)

    def parts(self, batch: Lesson, count: int) -> Sequence[Lesson]:
        return [Lesson(x, y) for x, y in zip(batch.x.chunk(count), batch.y.chunk(count))]

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student",)

    def losses(self, turn: str, batch: Lesson, clock: Clock) -> dict[str, Tensor]:
        if self.stacked:
            weights = {name: torch.stack([own[name] for own in self._named]) for name in self._named[0]}
            said: Sequence[Tensor] = self._forward(weights, batch.x).unbind(0)
        else:
            said = [network(batch.x) for network in self.networks]
        each = torch.stack([lesson_loss(logits, batch.y, **self.how) for logits in said])
        # a student whose learning rate was too high must not stop the others: it is left as it is and scores what it then scores
        return {"hard" if self.how["loss"] == "ce" else "soft": torch.where(each.isfinite(), each, torch.zeros_like(each)).sum()}


def run_quietly(program: Any) -> None:
    """Run a program of students through the engine's loop, without log, checkpoints and measurement of terms."""
    Loop(program, Plan(training=program.training, total=program.total, watch=0, log_every=program.total), "students").run()


def train_students(
    networks: Sequence[nn.Module], lessons: Lessons, training: Any, rates: Sequence[float], how: dict[str, Any] | None = None
) -> list[nn.Module]:
    """Train networks in place through the engine's loop, without log and checkpoints, and return them in evaluation mode.

    Raises:
        Interrupted: after Ctrl-C.
    """
    program = StudentsProgram(networks, lessons, training, rates, how)
    run_quietly(program)
    return [network.eval() for network in program.networks]


@torch.no_grad()
def said(network: nn.Module, x: Tensor, chunk: int = 1024) -> Tensor:
    """`(N, K)` logits of a network in evaluation mode."""
    network.eval()
    return torch.cat([network(part) for part in x.split(chunk)])
