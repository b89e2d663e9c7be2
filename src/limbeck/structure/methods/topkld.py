"""TopKLD: a quantised generator of tokens imitates its full-precision self, the tokens that are sampled apart from the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.losses import split_divergence, vocabulary
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.structure.quantising import Quantiser
from limbeck.structure.shaper import Pair
from limbeck.zoo.quantised import Scheme

_DIRECTIONS = ("forward", "reverse")


@dataclass
class TopKLD(Quantiser):
    """Quantise the trained model (`student: teacher`) and let it imitate itself; the K likeliest tokens have their own divergence.

    loss = sum_{v in top K of t} d_head(t_v, s_v) + sum_{other v} d_tail(t_v, s_v), mean over scored tokens
    forward: d = t log(t / s) - t + s; reverse: d = s log(s / t) - s + t
    Weights: one scale an output channel, symmetric: w_q = a round(w / a), a = max |w| / (2^(b - 1) - 1).
    Language models: a chunk of rows at a time (N, V); classifiers: logits (B, C).
    """

    card = Card(
        id="topkld",
        title="Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models",
        year=2025,
        arxiv="2501.06218",
        wing="structure",
        family="quantisation",
        claim="Distilling the top-K and the other tokens of the full-precision model apart lifts bit-level scaling laws by one level.",
        equation="sum_{top K} d_head(t, s) + sum_{rest} d_tail(t, s), d the terms of forward or reverse KL with -t + s",
        baseline="kd",
        certainty="inferred-from-abstract",
        deviations="The abstract only says that knowledge of the top K and of the rest is balanced; which divergence serves which part "
        "is not verified, nor how they are weighed. Reverse for the top K and forward for the rest is this project's choice; head and "
        "tail offer the other pairs, and head = tail = forward is quantisation-aware training with forward KL.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language", "classification")
    contract: ClassVar[dict[str, Any]] = {"bits": 4, "recipe": {"student": {"model": "teacher"}}}

    ends: str = setting(
        "8bit", "first layer, last layer and embeddings: same as the others, 8bit, or full precision", choices=("same", "8bit", "full")
    )
    top: float = setting(900 / 4096, "K: tokens of the head; below 1 a share of the vocabulary (900 of 4096 in the paper)", above=0)
    head: str = setting("reverse", "divergence of the K likeliest tokens of the teacher (unverified)", choices=_DIRECTIONS)
    tail: str = setting("forward", "divergence of the other tokens (unverified)", choices=_DIRECTIONS)
    temperature: float = setting(1.0, "T of both sides", above=0)
    activations: int | None = setting(
        None, "bits of the layers' inputs, symmetric, one scale a token; left out: full precision", at_least=2, at_most=8
    )

    def scheme(self, bits: int) -> Scheme:
        """Symmetric, one scale an output channel."""
        return Scheme.of_bits(bits, group="channel", symmetric=True, activations=self.activations)

    def setup(self, pair: Pair) -> None:
        """K in tokens.

        Raises:
            UserError: a stored top-k for a teacher, which does not hold the rest; no single class for each sample.
        """
        if pair.task.family == "classification":
            self.check_one_class(pair)
        width = pair.student_signals.logits.shape[-1] if pair.task.family == "classification" else pair.student_signals.law.width
        if isinstance(pair.teacher_signals.scores, vocabulary.Sparse):
            raise UserError("topkld needs all the teacher's logits, and a stored top-k holds only some", "use the teacher itself")
        self.count = min(width, max(1, round(self.top * width if self.top < 1 else self.top)))

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`topkld`."""
        settings = {"top": self.count, "head": self.head, "tail": self.tail, "temperature": self.temperature}
        if self.task.family == "classification":
            return {"topkld": split_divergence(student.logits, teacher.logits, **settings)}
        rows = vocabulary.rowwise(partial(split_divergence, reduction="none", **settings), student.law, teacher.law.detach())
        return {"topkld": rows.sum() / max(len(rows), 1)}
