"""What a teacher says of rows of the training data: one loop for every engine that stores it, in one process or in many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from limbeck import recipe as schema
from limbeck.data import Data
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.teachers import EnsembleTeacher, FrozenTeacher, Teacher, scored_counts
from limbeck.knowledge.tokens import check_tokens
from limbeck.losses.vocabulary import top_k
from limbeck.signals import Signals
from limbeck.signals.stored_form import INDICES, REST, VALUES
from limbeck.tasks import Task

Piece = tuple[Tensor, dict[str, Tensor]]
"""Row numbers `(B,)`, consecutive, and what the teacher says of them by name, `(B, ...)`."""


def check(recipe: schema.Recipe, wants: Sequence[str]) -> None:
    """Refuse what cannot be stored, before anything is trained or loaded.

    Raises:
        UserError: augmented inputs, a teacher that changes while the student learns, or signals that a store cannot hold.
    """
    if recipe.data.augment:
        raise UserError(
            f"data.augment ({', '.join(recipe.data.augment)}) changes the inputs in every epoch; a store holds one answer a sample",
            "leave it away: --set data.augment=[]",
        )
    if recipe.teacher.kind in ("online", "ema", "history"):
        raise UserError(
            f"a teacher of the kind {recipe.teacher.kind} changes while the student learns", "store a frozen one: --set teacher.kind=frozen"
        )
    if not wants:
        raise UserError("no signal is named", "for example --signals logits,embedding")
    for name in wants:
        if name in ("attention", "output"):
            raise UserError(f"{name} cannot be stored", "choose of logits, embedding, stages and module paths (see `limbeck inspect`)")


def wanted(recipe: schema.Recipe) -> tuple[str, ...]:
    """The teacher's signals that the recipe's method reads; the logits when it reads none."""
    return models.make_method(recipe.method).wants()[1] or ("logits",)


def flat(said: Signals, wants: Sequence[str]) -> dict[str, Tensor]:
    """Signals as the store names them: "stages" becomes "stages[0]", "stages[1]", ..."""
    found: dict[str, Tensor] = {}
    for name in wants:
        if name == "stages":
            found |= {f"stages[{number}]": value for number, value in enumerate(said.stages)}
        elif name.startswith("stages["):
            found[name] = said.stages[int(name[7:-1])]
        else:
            found[name] = getattr(said, name) if name in said else said.at[name.removeprefix("at:")]
    return found


@dataclass
class Labelling:
    """A teacher, the data it speaks of, and how they become rows.

    Batches have the size that training uses and start at multiples of it, so that each row is computed as a live teacher would compute
    it, whoever asks for which rows.

    Attributes:
        teacher: frozen, on the device.
        data: on the device.
        wants: the signals that are read.
        batch: samples a batch.
        device: where the teacher computes.
        teacher_fingerprint, data_fingerprint: what a store of these rows is bound to.
        shapes: name to shape of one row's signal.
        rows: how many there are.
        unit: what a row is: "samples" or "tokens".
        k: of next-token distributions the `k` most likely, None for all.
        starts: `(N + 1,)` of texts the first row of each sample; None where a row is a sample.
    """

    teacher: Teacher
    data: Data
    wants: tuple[str, ...]
    batch: int
    device: torch.device
    teacher_fingerprint: str
    data_fingerprint: str
    shapes: dict[str, tuple[int, ...]]
    rows: int
    unit: str
    k: int | None = None
    starts: Tensor | None = field(default=None, repr=False)

    @property
    def rows_a_batch(self) -> int:
        """About how many rows one batch of samples gives."""
        return max(1, round(self.batch * self.rows / len(self.data.train)))

    def pieces(self, first: int, end: int) -> Iterator[Piece]:
        """What the teacher says of the rows from `first` up to, but without, `end`, in order."""
        for index, said in self._tokens(first, end) if self.starts is not None else self._samples(first, end):
            begin, stop = max(first - int(index[0]), 0), min(end - int(index[0]), len(index))
            if begin or stop < len(index):
                index, said = index[begin:stop], {name: value[begin:stop] for name, value in said.items()}
            yield index, said
            first = int(index[-1]) + 1 if len(index) else first

    def _tokens(self, first: int, end: int) -> Iterator[Piece]:
        """One row for each scored token, in the order of the samples; logits of the whole vocabulary exist a chunk at a time."""
        starts, samples = self.starts, len(self.data.train)
        assert starts is not None
        sample = int(torch.searchsorted(starts, torch.tensor(first), right=True)) - 1
        for here in range(min(sample, samples - 1) // self.batch * self.batch, samples, self.batch):
            stop = min(here + self.batch, samples)
            if int(starts[here]) >= end:
                return
            if int(starts[stop]) == int(starts[here]):
                continue  # no token of this batch is scored
            law = self.teacher(self.data.train.batch(torch.arange(here, stop)).to(self.device)).law
            if self.k is None:
                logits = law.logits()
                said = {"logits": logits - logits.logsumexp(-1, keepdim=True)}
            else:
                top = top_k(law, self.k)
                rest = (-torch.expm1(top.logs.float().logsumexp(-1))).clamp_min(0)
                said = {VALUES: top.logs, INDICES: top.ids, REST: rest}
            yield torch.arange(int(starts[here]), int(starts[stop])), said

    def _samples(self, first: int, end: int) -> Iterator[Piece]:
        """One row for each sample; the last batch is as long as the others, and begins earlier."""
        for start in range(first // self.batch * self.batch, end, self.batch):
            index = torch.arange(min(start, self.rows - self.batch), min(start + self.batch, self.rows))
            yield index, flat(self.teacher(self.data.train.batch(index).to(self.device)), self.wants)


def _teacher(recipe: schema.Recipe, networks: Mapping[str, nn.Module], wants: tuple[str, ...], task: Task) -> Teacher:
    if not networks:
        raise UserError("the recipe names no teacher, so there is nothing to store", "set `teacher`, for example --set teacher=cnn")
    if len(networks) == 1:
        return FrozenTeacher(next(iter(networks.values())), wants, read=task.reader)
    if wants not in (("logits",), ("law",)):
        raise UserError(
            f"of several teachers only the logits of all together can be stored, not {', '.join(wants)}",
            "add --signals logits, or name one teacher",
        )
    return EnsembleTeacher({name: FrozenTeacher(network, read=task.reader) for name, network in networks.items()}, recipe.teacher.weights)


def labelling(recipe: schema.Recipe, session: Session, signals: Sequence[str] = (), k: int | None = None) -> Labelling:
    """Open the data and the teacher of a recipe; a teacher that the recipe trains is trained once and kept.

    Args:
        recipe: says which teacher and data.
        session: device, and who is told while a teacher has to be trained first.
        signals: what to read; by default what the recipe's method reads.
        k: of a language model's distributions keep this many.

    Raises:
        UserError: anything that the user can mend.
    """
    wants = tuple(dict.fromkeys(signals)) or wanted(recipe)
    check(recipe, wants)
    data = models.open_recipe_data(recipe.data, None, recipe)
    networks = models.teacher_networks(recipe, data, session, {})
    check_tokens(networks, data)
    task = models.task_of(recipe, data)
    if task.family == "language" and wants not in (("logits",), ("law",)):
        raise UserError(f"of a language model only next-token distributions can be stored, not {', '.join(wants)}", "add --signals logits")
    teacher = _teacher(recipe, networks, wants, task)
    on_device, starts = data.to(session.device), None
    if task.family == "language":
        shapes: dict[str, tuple[int, ...]] = {"logits": (task.text.vocabulary,)}  # type: ignore[attr-defined]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), scored_counts(data.train, task).cumsum(0)])
        unit, rows = "tokens", int(starts[-1])
    elif task.family == "classification":
        shapes = {name: tuple(value.shape[1:]) for name, value in flat(teacher(on_device.example(2).to(session.device)), wants).items()}
        unit, rows = "samples", len(data.train)
    else:
        raise UserError(f"outputs of a teacher of {task.kind} cannot be stored", "use the teacher itself")
    return Labelling(
        teacher,
        on_device,
        wants,
        min(recipe.training.batch, len(data.train)),
        session.device,
        models.teacher_fingerprint(networks, recipe.teacher.weights) or "",
        data.fingerprint,
        shapes,
        rows,
        unit,
        k if unit == "tokens" else None,
        starts,
    )
