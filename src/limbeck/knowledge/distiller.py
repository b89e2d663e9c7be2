"""What a method of the knowledge wing is: a loss, and whatever else of a training step it wants to change.

Most methods write `loss` and nothing else. The other methods of `Distiller` each have a default and may be overridden:

    reshape -> wrap -> setup -> (turns -> losses -> step -> loss) for each batch -> after_step -> finish
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.method import Method
from limbeck.signals.modes import evaluating
from limbeck.signals.signals import Signals

if TYPE_CHECKING:
    from limbeck.data.data import Data
    from limbeck.engine.session import Session
    from limbeck.knowledge.making import Making
    from limbeck.knowledge.teachers import Teacher
    from limbeck.tasks import Task


@dataclass
class Pair:
    """The job as a method sees it when it sets itself up.

    Attributes:
        student: the student, after `wrap`.
        teacher: whoever is learned from.
        task: what outputs mean.
        data: the data set; `data.train` is what is trained on.
        example: a small batch on the right device.
        training: the `training` block.
        total: optimiser steps of the run; `steps_per_epoch` of them make an epoch.
        device: where everything lives.
    """

    student: nn.Module
    teacher: Teacher
    task: Task
    data: Data
    example: Batch
    training: Any
    total: int
    steps_per_epoch: int
    device: torch.device
    _signals: dict[str, Signals] = field(default_factory=dict)
    read_student: Callable[[Any], Signals] | None = None

    @property
    def classes(self) -> int:
        """The number of classes C."""
        return len(self.task.classes)

    @property
    def student_signals(self) -> Signals:
        """What the student says about `example` in a dry pass (no gradient, evaluation mode)."""
        if "student" not in self._signals:
            self._signals["student"] = _dry(self.student, lambda: self.read_student(self.example))
        return self._signals["student"]

    @property
    def teacher_signals(self) -> Signals:
        """What the teacher says about `example`."""
        if "teacher" not in self._signals:
            with torch.no_grad():
                self._signals["teacher"] = self.teacher(self.example)
        return self._signals["teacher"]


def _dry(model: nn.Module, read: Callable[[], Signals]) -> Signals:
    with evaluating(model), torch.no_grad():
        return read()


@dataclass
class Models:
    """The two sides during training.

    Attributes:
        student: reads a batch through the student: `models.student(batch) -> Signals`, with gradient.
        teacher: the same for the teacher; without gradient unless the teacher learns. Several teachers:
            `models.teacher.members[name](batch)`.
        module: the student's network itself.
    """

    student: Callable[[Batch], Signals]
    teacher: Teacher
    module: nn.Module


@dataclass
class Distiller(Method):
    """Base of the knowledge wing's methods. A subclass is a dataclass with a `card` and a `loss`.

    Class attributes that a method may set:
        student_wants, teacher_wants: the signals to read ("logits", "embedding", "stages", "attention", or a module's path).
        teacher_kind: the kind of teacher it is made for: "frozen", "online", "history", or "none".
        teacher_names: the names its several teachers must have, when they play different parts.
        labelled_share: the share of labelled samples in a batch, when the method is made for a fixed mix.
        needs_valid: whether it learns something on a validation split.
        tasks: the families of tasks that it is for: "classification", "language", "embedding".
        bridges: whether it can learn from a teacher whose outputs are of another kind or width (another vocabulary).
        black_box: whether a teacher that writes texts and nothing else is enough for it (`prepare` asks it).
        shardable: whether it works on sharded networks although it changes more of a step than `loss` and `setup`.
        labelled_only: whether it can use labelled samples only (a baseline); unlabelled ones are then left out, for the same
            number of steps.

    Attributes:
        parts: modules that are trained with the student and thrown away afterwards (bridges, discriminators); saved in checkpoints.
        state: tensors and plain data that the method keeps between steps; saved in checkpoints.
        task: what outputs mean; set before `setup`.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    bridges: ClassVar[bool] = False
    black_box: ClassVar[bool] = False
    student_wants: ClassVar[tuple[str, ...]] = ("logits",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("logits",)
    teacher_kind: ClassVar[str] = "frozen"
    teacher_names: ClassVar[tuple[str, ...]] = ()
    labelled_share: ClassVar[float | None] = None
    needs_valid: ClassVar[bool] = False
    labelled_only: ClassVar[bool] = False
    shardable: ClassVar[bool] = False

    def bind(self, task: Task, complete: bool = False) -> None:
        """Start afresh for a new job: no parts, no state. `complete`: every sample of the training and validation split has a label."""
        self.complete = complete
        self.parts = nn.ModuleDict()
        self.state: dict[str, Any] = {}
        self.task = task

    # ---- what a method may override ----

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """The network that is trained from here on, made from the one that came into this stage; by default that itself.

        For methods of the structure wing, which prune, quantise, search or convert. `student` is an own copy and may be changed in place.
        Called once at the start of a stage; training inside it goes through `making.fit`, so that an interrupted run finds it again.
        """
        return student

    @classmethod
    def reshapes(cls) -> bool:
        """Whether the method makes another network of the student."""
        return cls.reshape is not Distiller.reshape

    def prepare(self, data: Data, teacher: Teacher, session: Session, seed: int) -> Data:
        """The data that the student learns from; by default what the recipe names. Black-box methods ask the teacher for texts here.

        Called once before the phase; what is slow must be kept on disk (in `session.folder`), so that a resumed run finds it.
        """
        return data

    def for_measuring(self, data: Data) -> Data:
        """The data on which the student is measured at the end, made from what the recipe names; by default that itself.

        For methods whose student reads its inputs in a form of their own (a word in front that names the task).
        """
        return data

    def wants(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The signals to read from the student and from the teacher; by default the two class attributes."""
        return self.student_wants, self.teacher_wants

    def wrap(self, student: nn.Module, example: Batch) -> nn.Module:
        """The network that is trained in the student's place (another head, say); by default the student itself."""
        return student

    def setup(self, pair: Pair) -> None:
        """Build `parts` and `state` for this pair; shapes are found in `pair.student_signals` and `pair.teacher_signals`."""

    def follow(self, before: Distiller) -> None:
        """Called after `setup` where another stage with the same method came before: take over what it learned (bridges); nothing here."""

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """One optimiser for each turn; by default one for the student, its parts, and a teacher that learns."""
        modules = [pair.student, self.parts, *pair.teacher.learning().values()]
        return {"student": make_optimizer(pair.training, [p for m in modules for p in m.parameters() if p.requires_grad])}

    def turns(self, clock: Clock) -> Sequence[str]:
        """Whose optimiser steps in this step, in order."""
        return ("student",)

    def losses(self, turn: str, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """The terms of one turn; a method with several turns tells them apart here."""
        return self.step(batch, models, clock)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """Read both sides and form the loss; override it to change what the two sides see."""
        teacher = models.teacher(batch)
        student = models.student(batch)
        terms = self.loss(batch, student, teacher, clock)
        models.teacher.observe(batch, student)
        return terms

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """The terms of the loss by name: scalars that are summed, each a mean over the scored samples of the batch."""
        raise NotImplementedError

    def after_step(self, clock: Clock) -> None:
        """Called when the optimisers have stepped."""

    def finish(self, student: nn.Module, models: Models, data: Data) -> nn.Module:
        """The network that is kept; by default the student as it is."""
        return student

    def figures(self, student: nn.Module, data: Data, task: Task, device: torch.device) -> dict[str, float]:
        """Further metrics of the finished student on the test split, beside the task's own; none by default."""
        return {}

    # ---- help for losses ----

    def check_one_class(self, pair: Pair) -> None:
        """For methods whose loss needs a distribution over classes: refuse several labels a sample, and single-column outputs.

        Raises:
            UserError: naming the method and the task.
        """
        if pair.task.kind == "multilabel" or pair.student_signals.logits.shape[-1] < 2:
            width = pair.student_signals.logits.shape[-1]
            raise UserError(
                f"{self.card.id} needs one class of several for each sample; here is a {pair.task.kind} task, outputs of width {width}",
                "use kd, or for yes-and-no tasks a model with two outputs",
            )

    def hard(self, batch: Batch, said: Any, **options: Any) -> Tensor:
        """The loss against the labels of what `Signals.scores` holds: mean over what has a label, zero where nothing has.

        A part of a batch (gradient accumulation) carries the factor that makes the mean one over the whole batch.
        """
        value = self.task.hard_loss(said, batch.labels, complete=self.complete, **options)
        scale = None if "share" in batch.extra else batch.extra.get("labelled_scale")
        return value if scale is None else value * scale
