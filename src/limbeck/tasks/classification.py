"""Classification: one class of many, several labels at once, or yes and no."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data.batch import UNLABELLED, Batch
from limbeck.errors import UserError, unknown
from limbeck.losses import bernoulli_kl, binary_cross_entropy, cross_entropy, forward_kl
from limbeck.losses._rows import wide
from limbeck.signals import Reader
from limbeck.tasks.base import Measured, Task
from limbeck.tasks.calibration import adaptive_calibration_error, brier_score, expected_calibration_error

if TYPE_CHECKING:
    from limbeck.data.split import Split
    from limbeck.signals import Signals

_KINDS = ("multiclass", "multilabel", "binary")


@dataclass(frozen=True)
class Classification(Task):
    """Which of `classes` a sample belongs to.

    Attributes:
        classes: their names, in the order of the logits.
        kind: "multiclass" (labels `(B,)`, logits `(B, C)`), "multilabel" (labels `(B, C)` of 0 and 1, logits `(B, C)`), or "binary"
            (two classes, labels `(B,)` or `(B, 1)` of 0 and 1, logits `(B, 1)` for the second class or `(B, 2)`).
        label_smoothing: of the hard loss only.
    """

    classes: tuple[str, ...]
    kind: Literal["multiclass", "multilabel", "binary"] = "multiclass"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.kind not in _KINDS:
            raise unknown("kind of classification", self.kind, _KINDS)
        if not self.classes:
            raise UserError("the task has no classes", "name at least one class")
        if self.kind == "binary" and len(self.classes) != 2:
            raise UserError(f"a binary task has two classes, {len(self.classes)} were named", "name two, or use kind='multiclass'")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}", "use 0 <= label_smoothing < 1")

    @property
    def primary(self) -> str:
        """ "map" for multi-label tasks, else "accuracy"."""
        return "map" if self.kind == "multilabel" else "accuracy"

    def check_logits(self, logits: Tensor) -> None:
        """The width of the logits must be the number of classes (or 1 for a binary task)."""
        allowed = (1, 2) if self.kind == "binary" else (len(self.classes),)
        if logits.ndim != 2 or logits.shape[1] not in allowed:
            raise UserError(
                f"the model gives logits of shape {tuple(logits.shape)}, the {self.kind} task needs (B, {' or '.join(map(str, allowed))}) "
                f"for its {len(self.classes)} classes",
                "give the model a head of that width, or the task the classes that the model was made for",
            )

    def reader(self, model: nn.Module, wants: Sequence[str], **options: Any) -> Callable[[Batch], Signals]:
        """A `limbeck.signals.Reader`."""
        return Reader(model, wants, **options)

    def example_size(self) -> int:
        """One sample for each class, so that parts which are built from an example see them all; at least 2."""
        return max(2, len(self.classes))

    def check_student(self, said: Signals) -> None:
        """The width of its logits, see `check_logits`."""
        self.check_logits(said.logits)

    def check_pair(self, student: Signals, teacher: Signals) -> None:
        """As many classes on both sides.

        Raises:
            UserError: naming both numbers.
        """
        if "logits" in teacher and teacher.logits.shape[-1] != student.logits.shape[-1]:
            raise UserError(
                f"the teacher gives {teacher.logits.shape[-1]} classes, the student {student.logits.shape[-1]}",
                "give both the same classes, or make the student with the teacher's number of classes",
            )

    def complete(self, labels: Tensor | None) -> bool:
        """No label is hidden."""
        return labels is not None and bool(Batch(None, labels).labelled.all())

    def measure(
        self, model: nn.Module | Callable[[Batch], Signals], split: Split, batch: int, device: torch.device, full: bool = False
    ) -> Measured:
        """Logits of the whole split and the figures of `metrics`; no figures where the split has no labels."""
        from limbeck.evaluation.predict import predict

        logits, labels = predict(model, split, batch, device)
        return Measured({} if labels is None else self.metrics(logits, labels), logits, labels)

    def _one_column(self, logits: Tensor) -> bool:
        return self.kind == "binary" and logits.shape[-1] == 1

    def hard_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        complete: bool = False,
    ) -> Tensor:
        """Cross-entropy (binary cross-entropy for one column or many labels); samples labelled -1 are not scored.

        `complete` promises that every sample has a label, which saves looking for hidden ones.

        >>> Classification(("no", "yes"), "binary").hard_loss(torch.zeros(2, 1), torch.tensor([1, -1]))
        tensor(0.6931)
        """
        if self.kind == "multilabel" or self._one_column(logits):
            return binary_cross_entropy(
                logits,
                labels.reshape(logits.shape) if self.kind == "binary" else labels,
                ignore=UNLABELLED,
                label_smoothing=self.label_smoothing,
                weight=weight,
                reduction=reduction,
            )
        if self.kind == "binary":
            labels = labels.reshape(len(logits)).long()
        ignore = None if complete else UNLABELLED
        return cross_entropy(logits, labels, ignore=ignore, label_smoothing=self.label_smoothing, weight=weight, reduction=reduction)

    def soft_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float = 1.0,
        weight: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Forward KL times T^2 (one Bernoulli KL a class for one column or many labels).

        >>> Classification(("a", "b")).soft_loss(torch.zeros(1, 2), torch.zeros(1, 2), 4.0)
        tensor(0.)
        """
        loss = bernoulli_kl if self.kind == "multilabel" or self._one_column(student_logits) else forward_kl
        return loss(student_logits, teacher_logits, temperature=temperature, weight=weight, reduction=reduction)

    def probabilities(self, logits: Tensor) -> Tensor:
        """`(B, C)`: softmax, or one sigmoid a class for many labels. A binary task always gives two columns.

        >>> Classification(("no", "yes"), "binary").probabilities(torch.zeros(1, 1))
        tensor([[0.5000, 0.5000]])
        """
        logits = wide(logits)
        if self.kind == "multilabel":
            return logits.sigmoid()
        if self._one_column(logits):
            return torch.cat([(-logits).sigmoid(), logits.sigmoid()], -1)
        return F.softmax(logits, -1)

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """accuracy (and accuracy_top5 from ten classes on), nll, brier, ece, adaptive_ece; for many labels also f1 and map.

        With many labels accuracy and calibration are those of the single yes-no decisions, f1 (threshold 0.5) and map (mean average
        precision) are means over the classes that occur. Unlabelled samples are left out.

        >>> Classification(("a", "b")).metrics(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))["accuracy"]
        0.5
        """
        self.check_logits(logits)
        if self.kind == "binary":
            labels = labels.reshape(len(logits)).long()
        logits, labels = logits.detach(), labels.detach()
        known = labels != UNLABELLED if labels.ndim == 1 else (labels != UNLABELLED).all(1)
        logits, labels = logits[known], labels[known]
        if not len(labels):
            raise UserError("there is no labelled sample to measure on", "give an evaluation split with labels")
        probabilities = self.probabilities(logits)
        nll = float(Classification(self.classes, self.kind).hard_loss(logits, labels))
        if self.kind == "multilabel":
            figures = self._multilabel(probabilities, labels)
            probabilities, labels = probabilities.flatten(), labels.flatten().long()
        else:
            figures = {"accuracy": float((probabilities.argmax(1) == labels).double().mean())}
            if probabilities.shape[1] >= 10:
                best = logits.topk(5, 1).indices
                figures["accuracy_top5"] = float((best == labels.unsqueeze(1)).any(1).double().mean())
        return figures | {
            "nll": nll,
            "brier": brier_score(probabilities, labels),
            "ece": expected_calibration_error(probabilities, labels),
            "adaptive_ece": adaptive_calibration_error(probabilities, labels),
        }

    @staticmethod
    def _multilabel(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        from sklearn.metrics import average_precision_score, f1_score

        truth, scores = labels.long().cpu().numpy(), probabilities.cpu().numpy()
        guess = scores > 0.5
        occurs = truth.any(0)
        figures = {"accuracy": float((guess == truth).mean()), "f1": math.nan, "map": math.nan}
        if occurs.any():
            truth, scores, guess = truth[:, occurs], scores[:, occurs], guess[:, occurs]
            each = range(truth.shape[1])
            figures["f1"] = sum(float(f1_score(truth[:, c], guess[:, c], zero_division=0)) for c in each) / len(each)
            figures["map"] = sum(float(average_precision_score(truth[:, c], scores[:, c])) for c in each) / len(each)
        return figures

    def chance(self, labels: Tensor, samples: int | None = None) -> float:
        """The share of the commonest class; for many labels the mean share of positives, which a random ranking scores as map.

        >>> Classification(("a", "b", "c")).chance(torch.tensor([0, 0, 1, -1]))
        0.6666666666666666
        """
        if self.kind == "multilabel":
            labels = labels[(labels != UNLABELLED).all(1)].double()
            share = labels.mean(0)
            return float(share[share > 0].mean()) if len(labels) and (share > 0).any() else 0.0
        labels = labels.reshape(-1)
        labels = labels[labels != UNLABELLED].long()
        if not len(labels):
            return 1 / len(self.classes)
        return int(torch.bincount(labels).max()) / len(labels)
