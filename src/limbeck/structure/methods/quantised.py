"""Quantised weights without a teacher: rounding after training, or training with the rounding in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.methods.alone import Alone
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.structure.quantising import Quantiser
from limbeck.structure.shaper import Making, Pair
from limbeck.zoo import quantised
from limbeck.zoo.quantised import Scheme


@dataclass
class Quantised(Quantiser):
    """Round the weights of a trained network, and perhaps train it on labels with the rounding in place.

    Weights: see `limbeck.zoo.quantised.Scheme`. loss = CE(s, y) at the quantised weights; the gradient goes to the full-precision ones.
    With `train: false` nothing is trained: each group's range is clipped where that lowers the squared error of its weights.
    """

    card = Card(
        id="quantised",
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        year=2017,
        arxiv="1712.05877",
        wing="structure",
        family="baseline",
        claim="None of distillation: this is what quantising with a teacher is compared with.",
        equation="CE(s at Q(w), y); w <- w - eta g(Q(w))",
        baseline="",
        certainty="recalled",
        deviations="Weights alone are quantised unless `activations` is set, and activations with a scale for each token, not with running "
        "ranges.",
    )
    teacher_kind: ClassVar[str] = "none"
    teacher_wants: ClassVar[tuple[str, ...]] = ()
    labelled_only: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "language", "embedding")
    contract: ClassVar[dict[str, Any]] = {"bits": 3}

    train: bool = setting(True, "train with the rounding in place; false rounds a trained network and leaves it so")
    group: str = setting(
        "channel", "what shares a scale: channel (an output channel), tensor, or bucket", choices=("channel", "tensor", "bucket")
    )
    bucket: int = setting(256, "consecutive weights in a bucket, where group is bucket", at_least=2)
    symmetric: bool = setting(False, "levels are symmetric around zero (one fewer); else they span the least to the largest weight")
    rounding: str = setting("nearest", "nearest, or stochastic while training", choices=quantised.ROUNDINGS)
    activations: int | None = setting(
        None, "bits of the layers' inputs, one scale a token; left out: full precision", at_least=2, at_most=8
    )

    def scheme(self, bits: int) -> Scheme:
        """As the settings say."""
        group = self.bucket if self.group == "bucket" else self.group
        return Scheme.of_bits(bits, group=group, symmetric=self.symmetric, rounding=self.rounding, activations=self.activations)

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """The student with quantised weights, clipped where nothing will be trained."""
        student = super().reshape(student, making)
        if not self.train:
            quantised.clip_ranges(student)
        return student

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """None without training."""
        return super().optimizers(pair) if self.train else {}

    def turns(self, clock: Clock) -> Sequence[str]:
        """None without training."""
        return ("student",) if self.train else ()

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """The labels' loss, as of `alone`."""
        plain = Alone()
        plain.task, plain.complete = self.task, self.complete
        return plain.loss(batch, student, teacher, clock)
