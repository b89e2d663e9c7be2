"""What the methods share that match, class by class, what real and synthetic samples do to a random network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    viewed = synthetic_classes(set, problem, views)
    real = [problem.real(c, batch_real) for c in range(problem.classes)]
    if problem.siamese is not None:
        pairs = [problem.siamese.pair(s, r) for s, r in zip(viewed, real)]
        viewed, real = [s for s, _ in pairs], [r for _, r in pairs]
    return Sides(torch.cat(viewed), torch.cat(real), [len(x) for x in viewed], [len(x) for x in real])


def synthetic_classes(set: SyntheticSet, problem: Problem, views: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The synthetic samples of each class, seen through the method's `views`."""
    if problem.siamese is None and set.patterns is None:
        counts = [problem.per_class * set.factor**2] * problem.classes
        return [views(x) for x in set.decode()[0].split(counts)]
    return [views(set.of_class(c)) for c in range(problem.classes)]


def class_means(features: Tensor, counts: Sequence[int]) -> Tensor:
    """`(K, ...)` means over the samples of each class, of features `(sum(counts), ...)` that stand class after class."""
    if len(set(counts)) == 1:
        return features.unflatten(0, (len(counts), counts[0])).mean(1)
    return torch.stack([part.mean(0) for part in features.split(list(counts))])


TOGETHER = 1 << 15
"""Numbers of input that go through a network in one pass: tiny samples of all classes together, larger ones class by class.

On a CPU a small pass costs little more than its overhead, and a large one falls out of the cache (measured, `benchmarks/condensation.py`).
"""
AT_MOST = 1 << 17
"""Numbers of input in one pass without graph on a CPU: a class goes in pieces of at most so many, or one by one (memory, likewise)."""


def _together(problem: Problem, x: Tensor, counts: Sequence[int]) -> list[list[int]]:
    """The counts of the classes of each pass; a network with BatchNorm sees all in one, because its statistics are those of a pass."""
    groups: list[list[int]] = [[]]
    for count in counts:
        if groups[-1] and not problem.batch_norms and (sum(groups[-1]) + count) * x[0].numel() > TOGETHER:
            groups.append([])
        groups[-1].append(count)
    return groups


def class_signals(
    problem: Problem, reader: Reader, x: Tensor, counts: Sequence[int], pick: Callable[[Signals], list[Tensor]]
) -> list[Tensor]:
    """`(K, ...)` class means of what `pick` takes from the signals of samples that stand class after class.

    Args:
        problem: whose inner network it is.
        reader: of such a network.
        x: `(sum(counts), ...)`.
        counts: samples of each class.
        pick: signals to tensors with one row a sample.
    """
    found: list[list[Tensor]] = []
    groups = _together(problem, x, counts)
    for part, group in zip(x.split([sum(group) for group in groups]), groups):
        whole = problem.batch_norms or torch.is_grad_enabled() or x.device.type != "cpu"
        pieces = [part] if whole else part.split(max(1, AT_MOST // part[0].numel()))
        read = [torch.cat(values) if len(values) > 1 else values[0] for values in zip(*(pick(reader(piece)) for piece in pieces))]
        found.append([class_means(value, group) for value in read])
    return [torch.cat(values) if len(values) > 1 else values[0] for values in zip(*found)]


def embedding_distance(problem: Problem, reader: Reader, x: Tensor, counts: Sequence[int], wanted: Tensor) -> Tensor:
    """The sum over classes and features of (class mean of the embeddings of `x` - `wanted`)^2, one pass's graph at a time.

    Args:
        problem, reader, x, counts: see `class_signals`; the reader gives embeddings.
        wanted: `(K, ...)`, without graph.
    """
    groups = _together(problem, x, counts)
    targets = wanted.split([len(group) for group in groups])

    def distance(part: Tensor, number: int) -> Tensor:
        return ((class_means(reader(part).embedding, groups[number]) - targets[number]) ** 2).sum()

    return part_by_part(x, [sum(group) for group in groups], distance)


class _Summed(torch.autograd.Function):
    """A value whose gradient for `x` is known already."""

    @staticmethod
    def forward(ctx, value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None, upstream * gradient, None


def part_by_part(x: Tensor, sizes: Sequence[int], loss_of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The sum over parts of a loss of each part alone; value and gradient are those of the plain sum, at the memory of one part.

    Each part's gradient is formed at once and its graph let go, where the plain sum keeps the graphs of all parts until the backward
    pass. Gradients reach `x` and what lies before it, nothing else, and not twice. Under float16 autocast it is the plain sum: there a
    scaler has to enlarge the loss before any gradient is formed.

    Args:
        x: `(sum(sizes), ...)`, part after part.
        sizes: rows of each part.
        loss_of: a part and its number to a scalar.
    """
    kind = x.device.type
    scaled = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    if scaled or not (x.requires_grad and torch.is_grad_enabled()):
        return torch.stack([loss_of(part, number) for number, part in enumerate(x.split(list(sizes)))]).sum()
    values, gradients = [], []
    for number, part in enumerate(x.detach().split(list(sizes))):
        part = part.requires_grad_(True)
        loss = loss_of(part, number)
        gradients.append(torch.autograd.grad(loss, part)[0])
        values.append(loss.detach())
    return _Summed.apply(torch.stack(values).sum(), x, torch.cat(gradients))


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
