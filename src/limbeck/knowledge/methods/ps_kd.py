"""PS-KD: a network learns from what it said itself an epoch ago, more and more."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.losses import soft_cross_entropy
from limbeck.method import Card, setting
from limbeck.signals import Reader, Signals


@dataclass
class PSKD(Distiller):
    """The target is the label mixed with the student's own former answer, whose share grows with the epochs. There is no teacher.

    Q (N, C) holds what the student said about each training sample when it last met it (training mode, as augmented then); it is written
    back after the loss was formed. A sample that was not met yet has its own label there. e counts epochs from 0, E is their number.

    loss = mean_b sum_c -((1 - a) y_bc + a Q_bc) log softmax(s)_bc,  a = alpha (e + 1) / E
    source "snapshot" keeps no Q but a copy of the student as it was at the end of the former epoch, and asks it about the very batch.
    Samples without label are not scored.
    """

    card = Card(
        id="ps-kd",
        title="Self-Knowledge Distillation with Progressive Refinement of Targets",
        year=2020,
        arxiv="2006.12000",
        wing="knowledge",
        family="response",
        claim="Learning from its own former predictions makes a network more accurate and better calibrated, without a teacher.",
        equation="CE((1 - a) y + a Q, s), Q = the student's probabilities an epoch ago, a = alpha (e+1)/E",
        baseline="alone",
        certainty="verified-in-code",
        deviations="A sample that the incomplete last batch of the first epoch left out gets its label as Q when it is first met "
        "(the release leaves zeros). The snapshot answers in evaluation mode; it follows the paper's text, the release has no code for it.",
    )
    teacher_kind: ClassVar[str] = "history"

    alpha: float = setting(0.8, "share of the former prediction in the target in the last epoch", at_least=0, at_most=1)
    source: Literal["memory", "snapshot"] = setting("memory", "a table of former predictions, or the former epoch's network (slower)")

    def setup(self, pair: Pair) -> None:
        """For `snapshot` a copy of the student: a part without gradient, so it is in every checkpoint and in no optimiser."""
        self.check_one_class(pair)
        if self.source == "snapshot":
            self._student = pair.student
            self.parts["snapshot"] = copy.deepcopy(pair.student).requires_grad_(False)
            self._former = Reader(self.parts["snapshot"], ("logits",), grad=False)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """The table serves `memory`; `snapshot` asks the former network, and the label alone before there is one."""
        if self.source == "memory":
            return super().step(batch, models, clock)
        said = Signals()
        if clock.epoch:
            self.parts["snapshot"].eval()  # the parts are put into training mode with the student
            said = self._former(batch.inputs)
        return self.loss(batch, models.student(batch), said, clock)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce`: the cross-entropy with the mixed target."""
        share = self.alpha * min(1.0, (clock.epoch + 1) / math.ceil(clock.epochs))
        known = batch.labelled.to(student.logits.device)
        target = F.one_hot(batch.labels.clamp_min(0), student.logits.shape[-1]).to(torch.float32)
        if "logits" in teacher:
            target = (1 - share) * target + share * teacher.logits.to(target).softmax(-1)
        return {"ce": soft_cross_entropy(student.logits, target, mask=known) * batch.extra.get("labelled_scale", 1.0)}

    def after_step(self, clock: Clock) -> None:
        """At the end of an epoch the student becomes the snapshot."""
        if self.source == "snapshot" and (clock.step + 1) % clock.steps_per_epoch == 0:
            self.parts["snapshot"].load_state_dict(self._student.state_dict())
