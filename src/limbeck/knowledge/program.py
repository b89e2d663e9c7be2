"""The knowledge wing's program: a method, a student and a teacher, as the engine drives them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.data.augment import Augment
from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.data.data import Data
from limbeck.engine import sharding
from limbeck.engine.clock import Clock
from limbeck.engine.program import moving_average
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.teachers import OnlineTeacher, StoredTeacher, Teacher
from limbeck.signals import Signals
from limbeck.tasks import Task

COLLAPSED = 1e-3
"""Mean entropy of the outputs, in nats, below which they are called collapsed when they are also mostly wrong."""


def steps_of(training: Any, steps_per_epoch: int) -> int:
    """The number of steps that a `training` block asks for."""
    return int(training.steps) if training.steps is not None else max(1, round(training.epochs * steps_per_epoch))


def check_family(method: Distiller, task: Task) -> None:
    """Refuse a method that is not for this family of tasks.

    Raises:
        UserError: naming both.
    """
    if task.family not in method.tasks:
        raise UserError(
            f"{method.card.id} is for {' and '.join(method.tasks)}, and this is a {task.kind} task",
            f"`limbeck methods {task.family}` lists what can work with it",
        )


WHOLE = ("wrap", "optimizers", "turns", "losses", "step", "after_step", "finish")
"""Parts of a step in which a method gets networks, not signals; one that writes them says itself whether shards do (`shardable`)."""


def check_shardable(method: Distiller, teacher: Teacher, training: Any) -> None:
    """Refuse what needs a whole copy of the student, or a second network that learns, where models are sharded.

    Raises:
        UserError: naming what it is.
    """
    what = None
    changed = [name for name in WHOLE if getattr(type(method), name) is not getattr(Distiller, name)]
    if changed and not method.shardable:
        what = f"{method.card.id} has a {' and a '.join(changed)} of its own, which may want whole networks"
    elif training.ema is not None:
        what = "training.ema keeps a second whole student"
    elif teacher.kept():
        what = f"the teacher of {method.card.id} changes while it teaches"
    if what is not None:
        raise UserError(f"models cannot be sharded here: {what}", "set parallel=ddp")


class KnowledgeProgram:
    """Implements `limbeck.engine.program.Program` for a `Distiller`.

    Args:
        method: the method; it is bound to this job here.
        student: the network to train, on its device.
        teacher: whoever is learned from.
        data: the data set, on its device where it is held in memory.
        task: what outputs mean.
        training: the `training` block.
        seed: of the order of the samples.
        augment: transformations of the training inputs.
        total: steps to make; None for what `training` says.
        evaluate_on: "valid" or "test": what is measured while training; nothing when the split is missing.
        evaluate_batch: samples at a time when measuring.
        device: where everything lives.
        precision: in which the weights of sharded models are gathered, see `limbeck.engine.sharding`.
    """

    def __init__(
        self,
        method: Distiller,
        student: nn.Module,
        teacher: Teacher,
        data: Data,
        task: Task,
        training: Any,
        *,
        seed: int = 0,
        augment: Sequence[str] = (),
        total: int | None = None,
        evaluate_on: str = "valid",
        evaluate_batch: int = 512,
        device: torch.device | str = "cpu",
        precision: str = "no",
    ) -> None:
        self.device = torch.device(device)
        if augment and isinstance(teacher, StoredTeacher):
            raise UserError(
                "stored teacher outputs belong to inputs as they are, and data.augment changes them",
                "leave data.augment empty, or use the teacher itself",
            )
        if augment:
            data = data.with_augment(Augment(list(augment)))
        self.method, self.teacher, self.data, self.task, self.training = method, teacher, data, task, training
        share = training.labelled_share if training.labelled_share is not None else method.labelled_share
        if share is not None and (data.labelled == len(data.train) or data.labelled == 0):
            share = None  # every sample is alike, there is nothing to mix
        among = processes.rank(), processes.world()
        self._batches = Batches(data.train, min(training.batch, len(data.train)), seed=seed, labelled_share=share, share=among)
        self.steps_per_epoch = self._batches.steps_per_epoch
        self.total = total or steps_of(training, self.steps_per_epoch)
        if self._batches.batch_size % (training.accumulate * processes.world()):
            among = f" for each of {processes.world()} processes" if processes.world() > 1 else ""
            raise UserError(
                f"a batch of {self._batches.batch_size} cannot be cut into {training.accumulate} equal parts{among}",
                "set training.batch (it counts the samples of all processes together) or training.accumulate",
            )
        check_family(method, task)
        if method.needs_valid and data.valid is None:
            raise UserError(
                f"{method.card.id} learns on a validation split, and there is none", "set data.valid, for example data.valid=0.1"
            )

        parts = [split for split in (data.train, data.valid) if split is not None]
        method.bind(task, complete=all(task.complete(split.labels) for split in parts))
        example = data.example(min(len(data.train), task.example_size())).to(self.device)
        self.student = method.wrap(student, example).to(self.device)
        self._whole: nn.Module | None = None
        if processes.sharding():
            check_shardable(method, teacher, training)
            self._whole = copy.deepcopy(self.student).to("cpu")
            sharding.shard(self.student, self.device, precision)
        self._reader = task.reader(self.student, method.wants()[0])
        self._last: tuple[Batch, Tensor] | None = None
        self._pending: list[str] = []
        self.pair = Pair(
            self.student, teacher, task, data, example, training, self.total, self.steps_per_epoch, self.device, read_student=self._reader
        )
        task.check_student(self.pair.student_signals)
        if not method.bridges:
            task.check_pair(self.pair.student_signals, self.pair.teacher_signals)
        method.setup(self.pair)
        method.parts.to(self.device)
        self.models = Models(self._read, teacher, self.student)
        if self._whole is not None:
            sharding.let_go(self.student)
        self._optimizers = method.optimizers(self.pair)
        self.average = moving_average(self.student, training)
        self.evaluate_on, self.evaluate_batch = evaluate_on, evaluate_batch
        self.primary = (task.primary, task.higher_is_better)
        self._adds_teacher_loss = isinstance(teacher, OnlineTeacher) and method.teacher_kind != "online"

    def _read(self, batch: Batch) -> Signals:
        signals = self._reader(batch)
        self._last = (batch, signals.logits.detach()) if "logits" in signals else None  # nothing else: a step's graph and maps go with it
        return signals

    # ---- what the engine asks for ----

    def modules(self) -> dict[str, nn.Module]:
        """Student, the method's parts, teachers that change, and the moving average."""
        found: dict[str, nn.Module] = {"student": self.student, "parts": self.method.parts}
        found |= {f"teacher.{name}": network for name, network in self.teacher.kept().items()}
        if self.average is not None:
            found["average"] = self.average
        return found

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The method's optimisers, one for each turn."""
        return self._optimizers

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The training batches of an epoch from number `start` on, on the device."""
        batches = self._batches.epoch(epoch, start)
        return batches if self.device.type == "cpu" else (batch.to(self.device) for batch in batches)

    def parts(self, batch: Batch, count: int) -> list[Batch]:
        """Equal parts of a batch; each knows how much its labelled and its unlabelled samples weigh in the whole, that of all processes.

        Of tasks that score several items a sample (tokens), `extra["share"]` is what a part's mean weighs in the whole batch's mean.
        A method that forms a term on other samples than the part's names it in `extra["other_items"]`: all its parts weigh the same,
        because nobody knows yet how many items the later parts will have.
        """
        size = len(batch) // count
        labelled, items = batch.labelled, self.task.scored(batch)
        counts = [labelled.sum(), (~labelled).sum(), *([] if items is None else [items])]
        total, others, *items = processes.summed(torch.stack(counts)).clamp_min(1)
        weight, parts = count * processes.world(), []
        for number in range(count):
            pick = slice(number * size, (number + 1) * size if number + 1 < count else len(batch))
            part = batch.rows(pick)
            part.extra["labelled_scale"] = labelled[pick].sum() * weight / total
            part.extra["unlabelled_scale"] = (~labelled[pick]).sum() * weight / others
            if items:
                part.extra["share"] = self.task.scored(part) * weight / items[0]
            parts.append(part)
        return parts

    def turns(self, clock: Clock) -> Sequence[str]:
        """The method's turns."""
        return self.method.turns(clock)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The method's terms, and the labels' loss of an online teacher whose method gives it none."""
        terms = self.method.losses(turn, batch, self.models, clock)
        if self._adds_teacher_loss and turn == "student":
            terms = {**terms, "teacher": self.method.hard(batch, self.teacher(batch).scores)}
        if "share" in batch.extra:
            other = batch.extra.get("other_items", ())
            terms = {name: value if name in other else value * batch.extra["share"] for name, value in terms.items()}
        return terms

    def after_step(self, clock: Clock) -> None:
        """Moving averages and the method's own bookkeeping."""
        self.method.after_step(clock)
        self.teacher.after_step(self.student)
        if self.average is not None:
            self.average.update_parameters(self.student)

    def memory(self) -> dict[str, Any]:
        """The method's and the teacher's state."""
        return {"method": self.method.state, "teacher": self.teacher.memory()}

    def restore(self, memory: dict[str, Any]) -> None:
        """Take it back."""
        self.method.state = _placed(memory["method"], self.method.state)
        self.teacher.restore(memory["teacher"])

    def train(self) -> None:
        """Training mode for what learns; a frozen teacher is never reached by it."""
        for module in (self.student, self.method.parts, *self.teacher.learning().values()):
            module.train()

    def evaluate(self) -> dict[str, float]:
        """Metrics on the watched split; an alarm when the student is no better than chance late in the run."""
        split = self.data.valid if self.evaluate_on == "valid" else self.data.test
        if split is None:
            return {}
        metrics = self.task.measure(self.network(), split, self.evaluate_batch, self.device).metrics
        if not metrics:
            return {}
        chance, primary = self.task.chance(split.labels, len(split)), metrics[self.task.primary]
        if primary <= chance if self.task.higher_is_better else primary >= chance:
            self._pending.append(f"the student is no better than chance ({self.task.primary} {primary:.3f}, chance {chance:.3f})")
        return metrics

    def vitals(self) -> list[str]:
        """Alarms about the last batch: constant output, or confident and wrong."""
        alarms, self._pending = self._pending, []
        if self._last is None or len(self._last[0]) < 8:
            return alarms
        batch, logits = self._last
        logits = logits.float()
        if logits.shape[-1] > 1 and bool(logits.std(0).max() < 1e-6 * logits.abs().mean().clamp_min(1e-30)):
            alarms.append("constant output: the student says the same of every sample of a batch")
        if self.task.kind == "multiclass" and batch.labels is not None:
            logs = logits.log_softmax(-1)
            entropy = float(-(logs.exp() * logs).sum(-1).mean())
            known = batch.labelled
            if entropy < COLLAPSED and bool(known.any()):
                right = float((logits.argmax(-1) == batch.labels)[known].float().mean())
                if right < 0.5:
                    alarms.append(
                        f"entropy collapse: outputs are certain (mean entropy {entropy:.1e} nats) and mostly wrong ({right:.0%} right)"
                    )
        return alarms

    # ---- what comes out ----

    def network(self) -> nn.Module:
        """The student as it is measured and kept: the moving average where there is one."""
        return self.average.module if self.average is not None else self.student

    def finish(self) -> nn.Module:
        """The student that is kept, in evaluation mode, after the method's last word; whole again where it was sharded."""
        processes.level_buffers([self.student])
        network = self.network()
        if self._whole is not None:
            self._whole.load_state_dict(sharding.whole_weights(self.student))
            network = self._whole.to(self.device)
        return self.method.finish(network, self.models, self.data).eval()


def _placed(value: Any, like: Any) -> Any:
    """State from a checkpoint (which is read on the CPU), each tensor on the device where `setup` puts the one of its name."""
    if isinstance(value, Tensor):
        return value.to(like.device) if isinstance(like, Tensor) else value
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: _placed(item, like.get(key)) for key, item in value.items()}
    return value
