"""ERNIE-Tiny: the teacher, the data and the loss change one at a time, in four stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import soft_cross_entropy
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals

STAGES = {
    "general": ("pre-trained teacher, general texts", True, False),
    "general-enhanced": ("fine-tuned teacher, general texts", True, False),
    "task-adaptive": ("fine-tuned teacher, the task's texts", True, False),
    "task-specific": ("fine-tuned teacher, the task's texts and labels", True, True),
}
"""What each stage learns from: (in words, latent loss, labels' losses). Teacher and data of a stage are named in the recipe's `stages`."""


def attention_scores(maps: Tensor, mask: Tensor | None) -> Tensor:
    """Attention scores up to a constant a row, from the maps after the softmax: log a_ij minus its mean over the keys that are no padding.

    The softmax forgets a constant of each row, so nothing that the map tells is lost. Heads are averaged: their numbers may differ.

    Args:
        maps: `(B, heads, L, L)`.
        mask: `(B, L)` 1 on tokens; None where nothing is padded.

    Returns:
        `(B, L, L)`, zero at padded keys and queries.
    """
    logs = maps.float().clamp_min(1e-12).log()
    if mask is None:
        return (logs - logs.mean(-1, keepdim=True)).mean(1)
    keys = mask[:, None, None, :].to(logs)
    logs = (logs - (logs * keys).sum(-1, keepdim=True) / keys.sum(-1, keepdim=True).clamp_min(1)) * keys
    return logs.mean(1) * mask[:, :, None].to(logs)


def masked_mse(student: Tensor, teacher: Tensor, places: Tensor | None) -> Tensor:
    """Mean squared difference over the places that are true; `places` has the leading axes of the values."""
    squares = (student.float() - teacher.float()).square()
    if places is None:
        return squares.mean()
    places = places.reshape(*places.shape, *(1,) * (squares.ndim - places.ndim)).to(squares)
    return (squares * places).sum() / places.expand_as(squares).sum().clamp_min(1)


@dataclass
class ErnieTiny(Distiller):
    """Layers of student and teacher are matched in all stages; labels, the teacher's and the true ones, come in the last.

    L_lat = sum_m MSE(A_s^m, A_t^g(m)) + MSE(H_s^m W, H_t^g(m)),  g(m) = m L_t / L_s;  L_soft = CE(softmax(z_t), z_s);  L_hard = CE(z_s, y)
    general, general-enhanced, task-adaptive: L_lat;  task-specific: L_lat + L_soft + L_hard
    A attention scores (B, L, L), H layer outputs (B, L, D), W one trained matrix for all layers, handed from stage to stage and dropped at
    the end. Who teaches and on which texts is in the recipe's `stages`.
    """

    card = Card(
        id="ernie-tiny",
        title="ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression",
        year=2021,
        arxiv="2106.02241",
        wing="knowledge",
        family="language",
        claim="Changing teacher, data and loss one at a time in four stages keeps more of the teacher than changing all at once.",
        equation="sum_m MSE(A_s, A_t) + MSE(H_s W, H_t) [+ CE(softmax(z_t), z_s) + CE(z_s, y)]",
        baseline="ernie-tiny",
        certainty="recalled",
        deviations="Attention scores are taken from the maps, up to a constant of each row (the softmax ignores it), averaged over heads. "
        "Each stage begins with a fresh optimiser.",
    )
    student_wants: ClassVar[tuple[str, ...]] = ("logits", "stages", "attention")
    teacher_wants: ClassVar[tuple[str, ...]] = ("logits", "stages", "attention")

    stage: str = setting("task-specific", "which of the four stages this is", choices=tuple(STAGES))
    temperature: float = setting(1.0, "T of the soft labels, without T^2; the paper has 1", above=0)
    latent: float = setting(1.0, "weight of the latent loss", at_least=0)
    soft: float = setting(1.0, "weight of the teacher's labels", at_least=0)
    labels: float = setting(1.0, "weight of the true labels", at_least=0)

    def setup(self, pair: Pair) -> None:
        """Pair the layers and build W.

        Raises:
            UserError: the networks give no hidden states of a transformer, or the student is deeper than the teacher.
        """
        self.check_one_class(pair)
        own, other = pair.student_signals.stages, pair.teacher_signals.stages
        if own[0].ndim != 3 or other[0].ndim != 3:
            raise UserError(f"{self.card.id} matches the layers of transformers (B, L, D)", "use encoders of text such as bert")
        deep, tall = len(own), len(other)
        if deep > tall or len(pair.student_signals.attention) != deep or len(pair.teacher_signals.attention) != tall:
            raise UserError(
                f"the student has {deep} layers ({len(pair.student_signals.attention)} attention maps), the teacher {tall} "
                f"({len(pair.teacher_signals.attention)})",
                "give a student that is no deeper than its teacher, and both attn_implementation=eager",
            )
        self._layers = [round((m + 1) * tall / deep) - 1 for m in range(deep)]
        self.parts["W"] = nn.Linear(own[0].shape[-1], other[0].shape[-1], bias=False)

    def follow(self, before: Distiller) -> None:
        """W goes on from the stage before.

        Raises:
            UserError: the teachers of the two stages differ in width.
        """
        own, other = self.parts["W"].weight, before.parts["W"].weight
        if own.shape != other.shape:
            raise UserError(
                f"W has shape {tuple(other.shape)} after one stage of {self.card.id} and {tuple(own.shape)} in the next",
                "the stages share one matrix: give all their teachers the same width (one before and one after fine-tuning)",
            )
        self.parts["W"].load_state_dict(before.parts["W"].state_dict())

    def _latent(self, batch: Batch, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
        places = None if mask is None else mask.bool()
        both = None if places is None else places[:, :, None] & places[:, None, :]
        attention, hidden = [], []
        for m, g in enumerate(self._layers):
            own, other = attention_scores(student.attention[m], mask), attention_scores(teacher.attention[g], mask)
            attention.append(masked_mse(own, other, both))
            hidden.append(masked_mse(self.parts["W"](student.stages[m]), teacher.stages[g], places))
        return {"attention": self.latent * torch.stack(attention).sum(), "hidden": self.latent * torch.stack(hidden).sum()}

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`attention` and `hidden`; in the last stage also `soft` and `hard`."""
        _, latent, labels = STAGES[self.stage]
        terms = self._latent(batch, student, teacher) if latent and self.latent else {}
        if labels:
            targets = (teacher.logits.float() / self.temperature).softmax(-1)
            terms["soft"] = self.soft * soft_cross_entropy(student.logits, targets, temperature=self.temperature)
            if self.labels:
                terms["hard"] = self.labels * self.hard(batch, student.logits)
        return terms
