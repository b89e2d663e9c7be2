"""Hinton's knowledge distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class KD(Distiller):
    """Match the teacher's softened class probabilities, beside the labels.

    loss = (1 - alpha) * CE(student, label) + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T))
    Logits are (B, C), of language models (N, V) of the scored tokens. Samples without label take part in the second term only.
    """

    card = Card(
        id="kd",
        title="Distilling the Knowledge in a Neural Network",
        year=2015,
        arxiv="1503.02531",
        wing="knowledge",
        family="response",
        claim="A small network trained on the softened outputs of a large one, or of an ensemble, comes near it and beats labels alone.",
        equation="(1 - alpha) CE(s, y) + alpha T^2 KL(softmax(t/T) || softmax(s/T))",
        baseline="alone",
        certainty="recalled",
    )

    tasks: ClassVar[tuple[str, ...]] = ("classification", "language")

    temperature: float = setting(4.0, "T, softens both distributions; 4 is the CIFAR literature's habit, the paper tried 1 to 20", above=0)
    alpha: float = setting(0.9, "weight of the teacher's term; the labels get the rest", at_least=0, at_most=1)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`kl`, and `ce` unless the teacher's term has all the weight."""
        terms = {"kl": self.alpha * self.task.soft_loss(student.scores, teacher.scores, self.temperature)}
        if self.alpha < 1:
            terms["ce"] = (1 - self.alpha) * self.hard(batch, student.scores)
        return terms
