"""Training on labels alone: what every method is measured against, and how teachers are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller
from limbeck.losses import cross_entropy
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class Alone(Distiller):
    """Cross-entropy with the labels; there is no teacher. Label smoothing is the classic regulariser to compare with.

    loss = CE((1 - smoothing) one_hot(label) + smoothing / C, student)
    """

    card = Card(
        id="alone",
        title="Training on labels alone (a baseline, no paper)",
        year=1986,
        wing="knowledge",
        family="baseline",
        claim="None: this is what distillation is compared with.",
        equation="CE(s, y)",
        baseline="",
        certainty="verified-in-code",
    )
    teacher_kind: ClassVar[str] = "none"
    teacher_wants: ClassVar[tuple[str, ...]] = ()
    labelled_only: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "language", "embedding", "denoising")

    label_smoothing: float = setting(0.0, "share of the target spread over all classes (arXiv:1512.00567 uses 0.1)", at_least=0, at_most=1)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce`; of denoising networks `denoising`, their squared error; of embeddings `contrastive`, InfoNCE over the pairs of a batch."""
        if self.task.family == "embedding":
            return {"contrastive": self.task.pair_loss(student)}
        if self.task.family == "denoising":
            return {"denoising": self.task.hard_loss(student.prediction)}
        if self.task.family == "language":
            return {"ce": self.task.hard_loss(student.law, batch.labels, label_smoothing=self.label_smoothing)}
        if self.label_smoothing:
            scale = batch.extra.get("labelled_scale", 1.0)
            return {"ce": scale * cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)}
        return {"ce": self.hard(batch, student.logits)}
