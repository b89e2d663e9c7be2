"""TAID: a target that slides from the student's own distribution to the teacher's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import vocabulary
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class TAID(Distiller):
    """Distil towards softmax((1 - t) * stopgrad(student) + t * teacher); t grows, faster while the loss falls.

    loss = (1 - ratio) * CE(s, y) + ratio * J,  J = - mean over scored tokens of sum_v p_t log s
    After each step, with J_0 the loss before: d = (J_0 - J) / J_0, m <- momentum m + (1 - momentum) d,
      t <- min(t_end, max(t_start + (t_end - t_start) n / N, t + rate sigmoid(m) (1 - t)));  the first step only records J.
    Logits are interpolated, not probabilities; one update for each optimiser step.
    """

    card = Card(
        id="taid",
        title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
        year=2025,
        arxiv="2501.16937",
        wing="knowledge",
        family="language",
        claim="A moving target between student and teacher avoids averaging over modes and collapse, and beats fixed divergences.",
        equation="CE(softmax((1 - t) sg(s) + t z), s), t adaptive from t_start to 1",
        baseline="token-level-kd",
        certainty="verified-in-code",
        deviations="The schedule moves once an optimiser step, by the training loss of the whole batch; the released code also moves it in "
        "validation and for each part of an accumulated batch.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)

    t_start: float = setting(0.4, "where t begins; 0.4 for Phi-3 to TinyLlama, 0.2 for Llama-2 to TinyLlama", at_least=0, at_most=1)
    t_end: float = setting(1.0, "where t ends", at_least=0, at_most=1)
    rate: float = setting(5e-4, "alpha of the paper: how far one step moves t at most", at_least=0)
    momentum: float = setting(0.99, "beta of the paper: memory of the relative change of the loss", at_least=0, at_most=1)
    adaptive: bool = setting(True, "False: t is the straight line alone")
    ratio: float = setting(1.0, "weight of the interpolated term; the text itself gets the rest", at_least=0, at_most=1)

    def setup(self, pair: Pair) -> None:
        """t starts at `t_start`; t, momentum and the loss before are kept in checkpoints."""
        device = pair.device
        self.state = {name: torch.tensor(v, device=device) for name, v in (("t", self.t_start), ("m", 0.0), ("before", math.inf))}
        self._seen: list[Tensor] = []
        self._total = pair.total

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`interpolated`, and `ce` unless the former has all the weight."""
        value = vocabulary.divergence(student.law, teacher.law, "interpolated", progress=self.state["t"])
        self._seen.append(value.detach() * batch.extra.get("share", 1.0))
        terms = {"interpolated": self.ratio * value}
        if self.ratio < 1:
            terms["ce"] = (1 - self.ratio) * self.hard(batch, student.law)
        return terms

    def after_step(self, clock: Clock) -> None:
        """Move t by the loss of this step."""
        value = torch.stack(self._seen).mean()
        self._seen = []
        self.state = next_progress(self.state, value, (clock.step + 1) / max(self._total, 1), self)


def next_progress(state: dict[str, Tensor], value: Tensor, done: float, settings: TAID) -> dict[str, Tensor]:
    """The schedule's next state, without waiting for the device.

    Args:
        state: "t", "m" and "before" (the loss of the step before; infinite at the first step, which only records its loss).
        value: the loss of this step.
        done: share of all steps that are made.
        settings: t_start, t_end, rate, momentum, adaptive.
    """
    before, t, first = state["before"], state["t"], torch.isinf(state["before"])
    m = settings.momentum * state["m"] + (1 - settings.momentum) * (before - value) / (before + 1e-15)
    line = torch.full_like(t, settings.t_start + (settings.t_end - settings.t_start) * done)
    moved = torch.maximum(line, t + settings.rate * torch.sigmoid(m) * (1 - t)) if settings.adaptive else line
    moved = moved.clamp_max(settings.t_end)
    return {"t": torch.where(first, t, moved), "m": torch.where(first, state["m"], m), "before": value.to(before)}
