"""Whoever is learned from. Every kind turns a batch into signals and hides how."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.data.batch import Batch, move
from limbeck.errors import UserError
from limbeck.losses.vocabulary import Law, Sparse
from limbeck.signals import Reader, Signals
from limbeck.signals.stored_form import INDICES, REST, VALUES


class Teacher:
    """The interface, and the teacher that says nothing (for methods that need none)."""

    members: Mapping[str, Teacher] = {}

    def __call__(self, batch: Batch) -> Signals:
        """What the teacher says about a batch."""
        return Signals()

    def learning(self) -> dict[str, nn.Module]:
        """Networks that are trained together with the student, by name."""
        return {}

    def kept(self) -> dict[str, nn.Module]:
        """Networks that a checkpoint must hold (a frozen teacher is not among them: it never changes)."""
        return self.learning()

    def networks(self) -> dict[str, nn.Module]:
        """Every network behind it, by name."""
        return {}

    def observe(self, batch: Batch, student: Signals) -> None:
        """Told what the student said about a batch, after the loss was formed."""

    def after_step(self, student: nn.Module) -> None:
        """Told that the student was updated."""

    def memory(self) -> dict[str, Any]:
        """State that lives in no network."""
        return {}

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Take back what `memory` gave."""


Read = Callable[..., Callable[[Batch], Signals]]
"""Makes a reader from a network, the wanted signals and the options of `limbeck.signals.Reader`: that class, or a task's `reader`."""


class FrozenTeacher(Teacher):
    """One network that never changes: evaluation mode, no gradient, and only as deep as the deepest signal that is asked for.

    Args:
        network: the teacher; its parameters stop asking for gradients.
        wants: the signals to read.
        anatomy: where they are; found by a dry pass on `example` when it is needed and not given.
        read: makes the reader; the task's `reader` where the task is no classification.
    """

    def __init__(self, network: nn.Module, wants: tuple[str, ...] = ("logits",), anatomy: Any = None, read: Read = Reader) -> None:
        self.network = network.eval().requires_grad_(False)
        self.reader = read(network, wants, anatomy=anatomy, stop_early=True, grad=False)

    def __call__(self, batch: Batch) -> Signals:
        # no_grad, not inference_mode: a loss may save the teacher's tensors for its backward pass, which inference tensors forbid
        with torch.no_grad():
            return self.reader(batch)

    def networks(self) -> dict[str, nn.Module]:
        """The one network, as "teacher"."""
        return {"teacher": self.network}


class EnsembleTeacher(Teacher):
    """Several teachers as one.

    `logits` (of language models `law`, then as wide as the vocabulary in memory) are the logarithm of the weighted mean of the members'
    probabilities, so that their softmax is that mean; every member's own signals are in `members`.

    Args:
        members: teachers by name.
        weights: how much each counts (made to sum to 1; equal when left out), or a function of a batch that gives `(B, M)` weights
            for the members in order: a router.
    """

    def __init__(self, members: Mapping[str, Teacher], weights: Mapping[str, float] | Callable[[Batch], Tensor] | None = None) -> None:
        self.members = dict(members)
        if isinstance(weights, Mapping):
            if set(weights) != set(self.members):
                raise UserError(
                    f"teacher.weights names {', '.join(weights)}", f"the teachers are {', '.join(self.members)}: give each a weight"
                )
            if sum(weights.values()) <= 0:
                raise UserError("teacher.weights are all 0", "give at least one teacher a positive weight")
        self.weights = weights

    def __call__(self, batch: Batch) -> Signals:
        said = {name: member(batch) for name, member in self.members.items()}
        key = next((k for k in ("law", "logits") if all(k in signals for signals in said.values())), None)
        if key is None:
            return Signals(members=said)
        with torch.no_grad():
            found = [signals.law.logits() if key == "law" else signals.logits for signals in said.values()]
            logs = torch.stack([logits.float().log_softmax(-1) for logits in found], 1)  # (B, M, C)
            if callable(self.weights):
                shares = self.weights(batch).to(logs)
            else:
                given = [1.0] * len(said) if self.weights is None else [self.weights[name] for name in said]
                shares = torch.tensor(given, device=logs.device, dtype=logs.dtype).expand(len(logs), -1)
            shares = shares / shares.sum(1, keepdim=True)
            logits = (logs + shares.log().unsqueeze(-1)).logsumexp(1)
        if key == "law":
            return Signals(law=Law(dense=logits), members=said)
        return Signals(logits=logits, members=said)

    def networks(self) -> dict[str, nn.Module]:
        """The members' networks under the members' names."""
        return {name: network for name, member in self.members.items() for network in member.networks().values()}


class OnlineTeacher(Teacher):
    """A network that learns together with the student; its signals carry gradient, so losses detach what must not flow back.

    Args:
        network: the teacher, trained in the same turn as the student unless the method says otherwise.
        wants: the signals to read.
    """

    def __init__(self, network: nn.Module, wants: tuple[str, ...] = ("logits",), anatomy: Any = None, read: Read = Reader) -> None:
        self.network = network
        self.reader = read(network, wants, anatomy=anatomy)

    def __call__(self, batch: Batch) -> Signals:
        return self.reader(batch)

    def learning(self) -> dict[str, nn.Module]:
        """The network, as "teacher"."""
        return {"teacher": self.network}

    networks = learning


class MovingAverageTeacher(Teacher):
    """An exponential moving average of the student's weights (mean teacher, arXiv:1703.01780).

    Args:
        student: copied once; afterwards `w <- decay * w + (1 - decay) * student` after every step, buffers are copied.
        decay: 0.999 in the paper.
    """

    def __init__(
        self, student: nn.Module, decay: float = 0.999, wants: tuple[str, ...] = ("logits",), anatomy: Any = None, read: Read = Reader
    ) -> None:
        self.network = copy.deepcopy(student).eval().requires_grad_(False)
        self.decay = decay
        self.reader = read(self.network, wants, anatomy=anatomy, stop_early=True, grad=False)

    def __call__(self, batch: Batch) -> Signals:
        with torch.no_grad():
            return self.reader(batch)

    def kept(self) -> dict[str, nn.Module]:
        """The average, as "teacher"."""
        return {"teacher": self.network}

    networks = kept

    @torch.no_grad()
    def after_step(self, student: nn.Module) -> None:
        """Move a little towards the student."""
        for mine, other in zip(self.network.parameters(), student.parameters()):
            mine.lerp_(other, 1 - self.decay)
        for mine, other in zip(self.network.buffers(), student.buffers()):
            mine.copy_(other)


class HistoryTeacher(Teacher):
    """What the student itself said about each sample the last time it saw it.

    Signals: `logits` are log-probabilities `(B, C)`; `at["seen"]` `(B,)` bool tells which samples were met before. For others the
    one-hot label is given (uniform where it has none), as in the first epoch of PS-KD.

    Args:
        samples, classes: N and C; the memory is N x C float32 on the CPU or the batch's device.
    """

    def __init__(self, samples: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.probabilities = torch.full((samples, classes), 1.0 / classes, device=device)
        self.seen = torch.zeros(samples, dtype=torch.bool, device=device)

    def _index(self, batch: Batch) -> Tensor:
        if batch.index is None:
            raise UserError(
                "this loader does not tell which samples it gives", "a history needs sample indices: give tensors or a map-style Dataset"
            )
        return batch.index.to(self.seen.device)

    def __call__(self, batch: Batch) -> Signals:
        index = self._index(batch)
        probabilities, seen = self.probabilities[index], self.seen[index]
        if batch.labels is not None and batch.labels.ndim == 1:
            fresh = ~seen & batch.labelled.to(seen.device)
            hot = torch.nn.functional.one_hot(batch.labels.clamp_min(0), probabilities.shape[1]).to(probabilities)
            probabilities = torch.where(fresh.unsqueeze(1), hot, probabilities)
        return Signals(logits=probabilities.clamp_min(torch.finfo(torch.float32).tiny).log(), at={"seen": seen})

    def observe(self, batch: Batch, student: Signals) -> None:
        """Remember what the student said in this very forward pass, on whichever process it said it."""
        index = processes.joined(self._index(batch))
        self.probabilities[index] = processes.joined(student.logits.detach().float().softmax(-1))
        self.seen[index] = True

    def memory(self) -> dict[str, Any]:
        """The table of probabilities and who was seen."""
        return {"probabilities": self.probabilities, "seen": self.seen}

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Take the table back."""
        self.probabilities.copy_(memory["probabilities"])
        self.seen.copy_(memory["seen"])


class StoredTeacher(Teacher):
    """Outputs that `limbeck cache` wrote once; no network runs.

    Args:
        store: an open `limbeck.signals.Store`, already checked against teacher and data.
        wants: the signals to read; each must be in the store.
    """

    def __init__(self, store: Any, wants: tuple[str, ...] = ("logits",)) -> None:
        self.store, self.wants = store, wants
        for name in wants:
            if name not in store.layout.signals and not (name == "stages" and "stages[0]" in store.layout.signals):
                have = ", ".join(store.layout.signals)
                raise UserError(
                    f"the store {store.folder} holds {have}, not {name!r}",
                    f"write it again with `limbeck cache ... --signals {','.join(wants)}`",
                )

    def __call__(self, batch: Batch) -> Signals:
        if batch.index is None:
            raise UserError(
                "this loader does not tell which samples it gives",
                "stored outputs are found by sample index: give tensors or a map-style Dataset",
            )
        said = self.store.signals(batch.index)
        if batch.index.device.type == "cpu":
            return said
        values = {name: move(getattr(said, name), batch.index.device) for name in said}
        return Signals(at=move(said.at, batch.index.device), **values)


class EndpointTeacher(Teacher):
    """A remote teacher that writes texts; it says nothing about batches. A method asks it in `prepare`.

    Args:
        settings: the recipe's `teacher.endpoint` block.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings


class StoredLanguageTeacher(Teacher):
    """Next-token distributions that `limbeck cache` wrote once, one row for each scored token; no network runs.

    Signals: `law` is a `Sparse` (top k and the mass of the rest) or, of stores that hold everything, a `Law`.

    Args:
        store: an open `limbeck.signals.Store`, already checked against teacher and data; its rows are the split's scored tokens in order.
        split: what it was made from.
        task: tells how many tokens of each sample are scored.
    """

    def __init__(self, store: Any, split: Any, task: Any) -> None:
        self.store, self.task = store, task
        counts = scored_counts(split, task)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        if int(self.starts[-1]) != len(store):
            raise UserError(
                f"the store {store.folder} holds {len(store)} tokens, the training texts have {int(self.starts[-1])}",
                "store again with `limbeck cache`",
            )

    def __call__(self, batch: Batch) -> Signals:
        if batch.index is None:
            raise UserError("stored outputs are found by sample index, and this batch has none", "give a map-style data set")
        index = batch.index.cpu()
        rows = torch.cat([torch.arange(int(a), int(b)) for a, b in zip(self.starts[index], self.starts[index + 1])])
        return Signals(law=stored_law(self.store, rows, batch.index.device))


def scored_counts(split: Any, task: Any, at_once: int = 256) -> Tensor:
    """`(N,)` how many tokens of each sample of a split are scored."""
    counts = []
    for first in range(0, len(split), at_once):
        batch = split.batch(torch.arange(first, min(first + at_once, len(split))))
        counts.append(task.mask(batch.labels).sum(1).cpu())
    return torch.cat(counts)


def stored_law(store: Any, rows: Tensor, device: torch.device | str = "cpu") -> Law | Sparse:
    """The distributions of some rows of a store; see `limbeck.signals.stored_form` for the forms."""
    read = store.read(rows)
    if VALUES not in read:
        return Law(dense=read["logits"].to(device))
    values, rest = read[VALUES].float(), read[REST]
    # stored values are log-probabilities up to half precision; the kept mass is made exact again with the stored rest
    logs = values - values.logsumexp(-1, keepdim=True) + torch.log1p(-rest.clamp(0, 1 - 1e-6)).unsqueeze(-1)
    return Sparse(read[INDICES].long().to(device), logs.to(device), store.layout.classes)
