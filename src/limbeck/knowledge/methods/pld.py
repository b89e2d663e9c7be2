"""Plackett-Luce distillation: the student reproduces the teacher's ranking of the classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import UNLABELLED, Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import plackett_luce
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class PLD(Distiller):
    """Logits are worths in a game of picking classes one after the other; the student learns the teacher's order of picks.

    The label is picked first, then the other classes by falling teacher logit; each pick counts as much as the teacher believes in it. So
    one convex loss holds a weighted cross-entropy (the first pick) and the dark knowledge (the later ones), and nothing is mixed.

    loss = mean_b sum_k softmax(t / T)_{pi_k} (logsumexp_{l >= k} s_{pi_l} - s_{pi_k}),  pi_1 = label, pi_2.. = the others by falling t
    Logits s, t are (B, C). T softens the weights only: s is not divided by it, and there is no T^2.
    A sample without label is ranked by the teacher alone: its best class comes first.
    """

    card = Card(
        id="pld",
        title="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
        year=2025,
        arxiv="2506.12542",
        wing="knowledge",
        family="response",
        claim="One list-wise loss without a mixing weight beats KD, DIST and other objectives on CIFAR-100, ImageNet-1K and MS-COCO.",
        equation="sum_k softmax(t/T)_{pi_k} (logsumexp_{l>=k} s_{pi_l} - s_{pi_k}), pi = label first, then the teacher's order",
        baseline="kd",
        certainty="paper-text",
        deviations="Samples without label, which the paper does not have, are ranked by the teacher alone. `topk` is an addition.",
    )

    temperature: float = setting(1.0, "T, softens the weights of the picks; the paper has 1 on ImageNet and 4 on CIFAR-100", above=0)
    topk: int | None = setting(None, "rank only the teacher's best classes and the label; none for all, as in the paper", at_least=1)

    def setup(self, pair: Pair) -> None:
        """Nothing to build; refuses tasks whose classes do not compete."""
        self.check_one_class(pair)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`pld`, the only term."""
        best = teacher.logits.argmax(-1)
        first = best if batch.labels is None else torch.where(batch.labels == UNLABELLED, best, batch.labels)
        value = plackett_luce(student.logits, teacher.logits, first, temperature=self.temperature, topk=self.topk)
        return {"pld": value}
