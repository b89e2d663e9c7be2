"""What the methods share that match, class by class, what real and synthetic samples do to a random network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.condensation.functional import frozen
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.signals import Reader, Signals


@dataclass
class Sides:
    """Synthetic and real samples of every class, one class after the other, with the number of each class."""

    synthetic: Tensor
    real: Tensor
    counts: list[int]
    real_counts: list[int]


def sides(set: SyntheticSet, problem: Problem, batch_real: int, views: Callable[[Tensor], Tensor]) -> Sides:
    """All synthetic samples and `batch_real` real ones of each class; both of a class under one siamese draw of their own.

    Args:
        views: of the method, see `Condenser.views`.
    """
    if problem.siamese is None and set.patterns is None:
        counts = [problem.per_class * set.factor**2] * problem.classes
        synthetic = set.decode()[0]
        viewed = [views(x) for x in synthetic.split(counts)]
    else:
        viewed = [views(set.of_class(c)) for c in range(problem.classes)]
    real = [problem.real(c, batch_real) for c in range(problem.classes)]
    if problem.siamese is not None:
        pairs = [problem.siamese.pair(s, r) for s, r in zip(viewed, real)]
        viewed, real = [s for s, _ in pairs], [r for _, r in pairs]
    return Sides(torch.cat(viewed), torch.cat(real), [len(x) for x in viewed], [len(x) for x in real])


def class_means(features: Tensor, counts: Sequence[int]) -> Tensor:
    """`(K, ...)` means over the samples of each class, of features `(sum(counts), ...)` that stand class after class."""
    if len(set(counts)) == 1:
        return features.unflatten(0, (len(counts), counts[0])).mean(1)
    return torch.stack([part.mean(0) for part in features.split(list(counts))])


TOGETHER = 1 << 15
"""Numbers of input that go through a network in one pass: tiny samples of all classes together, larger ones class by class.

On a CPU a small pass costs little more than its overhead, and a large one falls out of the cache (measured, `benchmarks/condensation.py`).
"""


def class_signals(
    problem: Problem, reader: Reader, x: Tensor, counts: Sequence[int], pick: Callable[[Signals], list[Tensor]]
) -> list[Tensor]:
    """`(K, ...)` class means of what `pick` takes from the signals of samples that stand class after class.

    Args:
        problem: whose inner network it is; one with BatchNorm sees all classes in one pass, because its statistics are those of a pass.
        reader: of such a network.
        x: `(sum(counts), ...)`.
        counts: samples of each class.
        pick: signals to tensors with one row a sample.
    """
    groups: list[list[int]] = [[]]
    for count in counts:
        if groups[-1] and not problem.batch_norms and (sum(groups[-1]) + count) * x[0].numel() > TOGETHER:
            groups.append([])
        groups[-1].append(count)
    found: list[list[Tensor]] = []
    for part, group in zip(x.split([sum(group) for group in groups]), groups):
        found.append([class_means(value, group) for value in pick(reader(part))])
    return [torch.cat(values) if len(values) > 1 else values[0] for values in zip(*found)]


class RandomEncoder:
    """A network with random weights that are drawn again at every call; gradients reach its input only."""

    def __init__(self) -> None:
        self._network: nn.Module | None = None
        self._reader: Reader | None = None

    def __call__(self, problem: Problem, *wants: str) -> Reader:
        """A reader of a freshly drawn inner network in training mode.

        Args:
            wants: signals, see `limbeck.signals.Reader`.
        """
        network = problem.network(self._network)
        if network is not self._network or self._reader is None:
            self._network, self._reader = frozen(network), problem.reader(network, *wants)
        return self._reader
