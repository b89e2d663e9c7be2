"""Quantized distillation and differentiable quantization."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.losses import cross_entropy, entropy, forward_kl
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.structure.quantising import Quantiser, gradient_norms
from limbeck.structure.shaper import Making, Models, Pair
from limbeck.zoo import quantised
from limbeck.zoo.quantised import Scheme

_NONE = -1
"""The label of a sample that has none."""


@dataclass
class QuantizedDistillation(Quantiser):
    """Learn from a full-precision teacher with quantised weights ("weights"), or learn where the levels lie ("points").

    loss = asked (alpha T^2 KL(t^(1/T) || s^(1/T)) / C + (1 - alpha) CE(s, y)) + (1 - asked) CE(s, y), mean over samples; / C with reduction
    element. The student computes with Q(w); of buckets of `bucket` values Q(w) = a q(v) + b, v = (w - b) / a (see `Scheme`).
    weights: w <- w - eta dL/dQ(w).  points: w stays, p_k <- p_k - eta sum_{i: code k} a_i dL/dQ(w)_i.
    Logits are (B, C), of language models (N, V) of the scored tokens.
    """

    card = Card(
        id="quantized-distillation",
        title="Model compression via distillation and quantization",
        year=2018,
        arxiv="1802.05668",
        wing="structure",
        family="quantisation",
        claim="Quantised shallow students reach accuracy similar to full-precision teachers with an order of magnitude of compression.",
        equation="alpha T^2 mean_elements KL(t/T || s/T) + (1 - alpha) CE at Q(w); g = dL/dQ(w) moves w, or a g moves the points",
        baseline="quantised",
        deviations="Learned points are sorted where they are read, so that each keeps its momentum when two of them pass. They move in the "
        "mode alternate by SGD with Nesterov momentum as in the paper, in the mode points by the recipe's optimiser (the paper: SGD, "
        "lr 1e-5). Biases and norms are not quantised. Unlabelled samples take part in the teacher's term.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification", "language")
    contract: ClassVar[dict[str, Any]] = {"bits": 3, "bucket": 16}

    mode: str = setting(
        "weights",
        "weights (quantised distillation), points (differentiable quantisation, of a trained student), or alternate (one epoch each, "
        "ending on weights)",
        choices=("weights", "points", "alternate"),
    )
    bucket: int = setting(256, "consecutive weights that share a scale", at_least=2)
    rounding: str = setting("nearest", "nearest, or stochastic while training", choices=quantised.ROUNDINGS)
    backward: str = setting("none", "gradient through Q: none (straight through), truncated, or complicated", choices=quantised.BACKWARDS)
    alpha: float = setting(0.7, "weight of the teacher's term; the labels get the rest", at_least=0, at_most=1)
    temperature: float = setting(2.0, "T, softens both distributions", above=0)
    reduction: str = setting(
        "element",
        "mean of the teacher's term over samples and classes (element, as in the paper's code) or over samples (batch)",
        choices=("element", "batch"),
    )
    ask: str = setting(
        "always",
        "which samples ask the teacher: always; entropy (of the student above `cutoff`); chance (with probability entropy / log2 C); wrong",
        choices=("always", "entropy", "chance", "wrong"),
    )
    cutoff: float = setting(0.5, "entropy in bits above which a sample asks; the paper gives none", at_least=0)
    guide: str = setting(
        "teacher",
        "who is learned from: the teacher, or the student itself before it was quantised (as the paper does for points)",
        choices=("teacher", "itself"),
    )
    allocate: bool = setting(False, "share the levels out by the gradient's norm after 5 batches: half evenly, half by share")
    points_lr: float = setting(1e-5, "learning rate of the points in the mode alternate (the paper's); SGD, Nesterov momentum 0.9", above=0)

    def scheme(self, bits: int) -> Scheme:
        """Buckets between their least and largest value."""
        learned = self.mode != "weights"
        return Scheme.of_bits(bits, group=self.bucket, rounding=self.rounding, backward=self.backward, learned=learned)

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """The student with quantised weights; in the mode points nothing but the points can learn."""
        if self.mode != "weights" and self.backward == "complicated":
            raise UserError("the complicated gradient is that of evenly spaced levels", "set backward: none, or mode: weights")
        self._whole = copy.deepcopy(quantised.unfold(student)).eval().requires_grad_(False) if self.guide == "itself" else None
        student = super().reshape(student, making)
        if self.mode == "points":
            student.requires_grad_(False)
            for _, _, quantiser in quantised.fakes(student):
                assert quantiser.points is not None
                quantiser.points.requires_grad_(True)
        return student

    def levels_of(self, student: nn.Module, scheme: Scheme, making: Making) -> dict[str, int] | None:
        """Levels by the gradient's norm, where they are shared out so."""
        if not self.allocate:
            return None

        def decide() -> dict[str, int]:
            trial = copy.deepcopy(student)
            quantised.quantise(trial, scheme, ends=self.ends, layers=self.layers)
            return quantised.share_levels(gradient_norms(trial, making, batches=5), scheme.levels)

        return making.decided("levels", decide)

    def setup(self, pair: Pair) -> None:
        """Refuse tasks without one class of several, and choices that are made sample by sample where there are tokens."""
        if pair.task.family == "classification":
            self.check_one_class(pair)
        elif self.ask != "always":
            raise UserError(f"ask: {self.ask} chooses among samples, and this is a {pair.task.kind} task", "set ask: always")
        self._guide = None
        if self.guide == "itself":
            assert self._whole is not None
            self._guide = self.task.reader(self._whole.to(pair.device), self.teacher_wants, grad=False)

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """One for everything, or in the mode alternate one for the weights and one for the points."""
        if self.mode != "alternate":
            return super().optimizers(pair)
        points = [quantiser.points for _, _, quantiser in quantised.fakes(pair.student)]
        points = list({id(p): p for p in points if p is not None}.values())
        rest = [p for p in pair.student.parameters() if p.requires_grad and all(p is not q for q in points)]
        sgd = torch.optim.SGD(points, lr=self.points_lr, momentum=0.9, nesterov=True)
        return {"student": make_optimizer(pair.training, rest), "points": sgd}

    def turns(self, clock: Clock) -> Sequence[str]:
        """In the mode alternate an epoch for the points and one for the weights, the last one for the weights."""
        if self.mode != "alternate":
            return ("student",)
        left = math.ceil(clock.epochs) - 1 - clock.epoch
        return ("student",) if left % 2 == 0 else ("points",)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """As usual, the guide in the teacher's place where it is the student itself."""
        if self._guide is None:
            return super().step(batch, models, clock)
        return self.loss(batch, models.student(batch), self._guide(batch), clock)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`kl` and `ce`."""
        if self.task.family == "language":
            said = student.law
            share = self.alpha / (said.width if self.reduction == "element" else 1)
            kl = share * self.task.soft_loss(student.scores, teacher.scores, self.temperature)
            return {"kl": kl, "ce": (1 - self.alpha) * self.hard(batch, said)}
        asked = self._asked(student.logits.detach(), batch.labels)
        share = self.alpha / (student.logits.shape[-1] if self.reduction == "element" else 1)
        kl = share * forward_kl(student.logits, teacher.logits, temperature=self.temperature, weight=asked)
        scale = batch.extra.get("labelled_scale", 1.0)
        return {"kl": kl, "ce": scale * cross_entropy(student.logits, batch.labels, ignore=_NONE, weight=1 - self.alpha * asked)}

    def _asked(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`(B,)` 1 for the samples that ask the teacher; those without a label always do."""
        if self.ask == "always":
            return torch.ones_like(logits[:, 0])
        if self.ask == "wrong":
            asked = logits.argmax(-1) != labels
        else:
            bits = entropy(logits, reduction="none") / math.log(2)
            asked = bits > self.cutoff if self.ask == "entropy" else torch.rand_like(bits) < bits / math.log2(logits.shape[-1])
        return (asked | (labels == _NONE)).to(logits.dtype)
