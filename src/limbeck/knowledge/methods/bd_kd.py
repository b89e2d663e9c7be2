"""BD-KD: balanced divergences for online distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import entropy, forward_kl, reverse_kl
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class BDKD(Distiller):
    """Teacher and student learn together; the student's loss holds both KL directions, and the networks' entropies weigh them per sample.

    student: CE(s, y) + T^2 mean_b(w_F KL(t || s) + w_R KL(s || t));  teacher: CE(t, y) + T^2 mean_b KL(s || t)
    w_F = delta where the student is more certain than the teacher (smaller entropy), w_R = delta elsewhere; the other weight is 1.
    Logits are (B, C). In every cross term the other network is detached.
    """

    card = Card(
        id="bd-kd",
        title="BD-KD: Balancing the Divergences for Online Knowledge Distillation",
        year=2022,
        arxiv="2212.12965",
        wing="knowledge",
        family="online",
        claim="Balancing forward and reverse KL per sample improves accuracy and calibration "
        "of the compact student over online and offline distillation.",
        equation="CE(s, y) + T^2 (w_F KL(t||s) + w_R KL(s||t)) + CE(t, y) + T^2 KL(s||t)",
        baseline="alone",
        certainty="recalled",
        deviations="No official code was found: the direction of the entropy rule and delta are reconstructed, so both are settings. "
        "Unlabelled samples take part in the divergences only.",
    )
    teacher_kind: ClassVar[str] = "online"

    temperature: float = setting(3.0, "T of divergences and entropies; the paper's 3 wants a low learning rate", above=0)
    delta: float = setting(2.0, "weight of the favoured divergence (recalled)", at_least=0)
    rule: str = setting(
        "entropy",
        "how the two divergences are weighed; 'forward' is classic mutual learning",
        choices=("entropy", "none", "forward", "reverse"),
    )
    swap: bool = setting(False, "favour the other divergence in both cases of the entropy rule")

    def setup(self, pair: Pair) -> None:
        """Nothing to build; the loss needs one class of several."""
        self.check_one_class(pair)

    def weights(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """`(B,)` weights of the forward and of the reverse divergence."""
        one = torch.ones(len(student), device=student.device)
        if self.rule != "entropy":
            return {"none": (one, one), "forward": (one, 0 * one), "reverse": (0 * one, one)}[self.rule]
        with torch.no_grad():
            certain = entropy(student, self.temperature, reduction="none") < entropy(teacher, self.temperature, reduction="none")
        favour = certain ^ self.swap
        return torch.where(favour, self.delta * one, one), torch.where(favour, one, self.delta * one)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce`, `forward`, `reverse` of the student; `teacher_ce`, `teacher_kl` of the teacher."""
        s, t, temperature = student.logits, teacher.logits, self.temperature
        forward, reverse = self.weights(s, t)
        return {
            "ce": self.hard(batch, s),
            "forward": forward_kl(s, t.detach(), temperature=temperature, weight=forward),
            "reverse": reverse_kl(s, t.detach(), temperature=temperature, weight=reverse),
            "teacher_ce": self.hard(batch, t),
            "teacher_kl": forward_kl(t, s.detach(), temperature=temperature),
        }
