"""What every kind of task must be able to say about a model's outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from limbeck.data.batch import Batch
    from limbeck.data.split import Split
    from limbeck.signals.signals import Signals


@dataclass
class Measured:
    """What a model is worth on a split.

    Attributes:
        metrics: figures by name, the task's primary one among them.
        logits: `(N, C)` float32 on the CPU, where a task has one row a sample; else None.
        labels: as the batches carried them; None where there are none or where they are no classes.
        texts: rows of `prompt`, `reference` and `written` for the report, where a model writes.
    """

    metrics: dict[str, float]
    logits: Tensor | None = None
    labels: Tensor | None = None
    texts: list[dict[str, str]] = field(default_factory=list)


class Task(ABC):
    """The meaning of a model's outputs: how they are read, scored against labels, softened, and measured.

    Attributes:
        family: what kind of methods can work with it: "classification", "language" or "embedding".
        kind: the kind within its family.
        classes: names of the classes; empty where there are none.
        primary: the name of the headline metric, a key of what `measure` returns.
        higher_is_better: whether a larger `primary` is better.
    """

    family: ClassVar[str] = "classification"
    kind: str
    classes: tuple[str, ...] = ()
    higher_is_better: bool = True

    @property
    @abstractmethod
    def primary(self) -> str:
        """The name of the headline metric."""

    @abstractmethod
    def hard_loss(self, said: Any, labels: Tensor, **options: Any) -> Tensor:
        """The loss against labels of what `Signals.scores` holds; a mean over what has a label."""

    @abstractmethod
    def soft_loss(self, student: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        """The plain distillation loss: how far the student's distribution is from the teacher's (both as in `Signals.scores`)."""

    @abstractmethod
    def reader(self, model: nn.Module, wants: Sequence[str], **options: Any) -> Callable[[Batch], Signals]:
        """What reads a batch through a model and gives the signals that were asked for; options as of `limbeck.signals.Reader`."""

    @abstractmethod
    def check_student(self, said: Signals) -> None:
        """Raise a `UserError` that names both sides when a model's outputs cannot be this task's."""

    @abstractmethod
    def check_pair(self, student: Signals, teacher: Signals) -> None:
        """Raise a `UserError` when teacher and student do not speak of the same outputs."""

    @abstractmethod
    def measure(
        self, model: nn.Module | Callable[[Batch], Signals], split: Split, batch: int, device: torch.device, full: bool = False
    ) -> Measured:
        """Every figure of a model (or of a teacher, which is called with batches) on a split.

        Args:
            model: put into evaluation mode meanwhile.
            split: where samples come from.
            batch: samples at a time.
            device: where the model lives.
            full: also what is slow, such as writing text; False while training.
        """

    @abstractmethod
    def chance(self, labels: Tensor | None, samples: int | None = None) -> float:
        """What `primary` is for a model that knows nothing of the inputs: the floor that a student must pass.

        Args:
            labels: of the split that is measured, if it has any.
            samples: how many it has.
        """

    def example_size(self) -> int:
        """Samples of a dry pass."""
        return 2

    def complete(self, labels: Tensor | None) -> bool:
        """Whether every sample of a split has a label."""
        return True

    def scored(self, batch: Batch) -> Tensor | None:
        """How many items of a batch its mean losses are taken over (a tensor without dimensions); None for its samples.

        Where it is not None, a part of a batch weighs as much as it has items, so that a loss does not depend on how a batch is cut.
        """
        return None

    def cost_inputs(self, model: nn.Module, batch: Batch) -> Any:
        """What a model is called with when its cost is measured."""
        return batch.inputs

    def reading(self, model: nn.Module | Callable[[Batch], Signals], wants: Sequence[str]) -> Callable[[Batch], Signals]:
        """How a network is read without gradient; what is no network (a teacher) is called as it is."""
        return self.reader(model, wants, grad=False) if isinstance(model, nn.Module) else model

    def price(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """What a model costs, measured on a batch: `limbeck.evaluation.cost` and the task's own `speed`."""
        from limbeck.evaluation.cost import cost

        inputs = self.cost_inputs(model, batch)
        return cost(model, inputs).as_dict() | self.speed(model, inputs)

    def speed(self, model: nn.Module, inputs: Any) -> dict[str, float]:
        """Further figures of a model's price, beside those of `limbeck.evaluation.cost`; none by default."""
        return {}

    def compare(self, student: Any, teacher: Any, split: Split, batch: int, device: torch.device) -> dict[str, float]:
        """How near two models are on a split, beyond what `measure` tells; nothing by default."""
        return {}
