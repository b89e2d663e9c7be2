"""What every kind of task must be able to say about a model's outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Task(ABC):
    """The meaning of logits: how they are scored against labels, softened, and measured.

    Attributes:
        primary: the name of the headline metric, a key of what `metrics` returns.
        higher_is_better: whether a larger `primary` is better.
    """

    higher_is_better: bool = True

    @property
    @abstractmethod
    def primary(self) -> str:
        """The name of the headline metric."""

    @abstractmethod
    def hard_loss(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, reduction: str = "mean", complete: bool = False
    ) -> Tensor:
        """The loss against labels; samples without a label are not scored. `complete` promises that there are none of them."""

    @abstractmethod
    def soft_loss(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """The plain distillation loss: how far the student's distribution is from the teacher's."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits as probabilities."""

    @abstractmethod
    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """All figures for a whole split, `primary` among them."""

    @abstractmethod
    def chance(self, labels: Tensor) -> float:
        """What `primary` is for a model that knows nothing but the labels' frequencies: the floor that a student must pass."""

    @abstractmethod
    def check_logits(self, logits: Tensor) -> None:
        """Raise a `UserError` that names both sides when the logits cannot be this task's."""
