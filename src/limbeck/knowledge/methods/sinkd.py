"""SinKD: what a batch of students says is moved onto what a batch of teachers says, at the least cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import batch_transport, soft_cross_entropy, vocabulary
from limbeck.losses._rows import wide
from limbeck.losses.vocabulary import Law
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class SinKD(Distiller):
    """Every sample's distribution is a point; an optimal transport between the two clouds of points joins KD and the labels.

    The transport keeps its force where distributions hardly overlap, and sees the samples of a batch together. It may match student i with
    teacher j, so it is never alone: KD and the labels hold each sample in its place.

    loss = alpha * SoftCE(t, s; T) + (1 - alpha) * CE(s, y) + beta * scale * sum_ij P_ij W_ij
    W_ij = |softmax(s_i / T_w) - softmax(t_j / T_w)|_1, P = Sinkhorn(exp(-W / epsilon)), rows then columns
    Logits are (B, C), W and P (B, B). P has mass B, so the term grows with the batch. Samples without label take part in all but the CE.
    Of language models the rows are scored tokens: the transport runs in blocks of `block` neighbouring tokens over the whole vocabulary,
    made one block at a time, and is a mean over the blocks; SoftCE is written as KL (the same gradient).
    """

    card = Card(
        id="sinkd",
        title="Sinkhorn Distance Minimization for Knowledge Distillation",
        year=2024,
        arxiv="2402.17110",
        wing="knowledge",
        family="response",
        claim="A batch-wise Sinkhorn distance beside KD beats divergences on GLUE and SuperGLUE for all three kinds of transformers.",
        equation="alpha SoftCE(t, s; T) + (1 - alpha) CE(s, y) + beta scale sum_ij P_ij |softmax(s_i/T_w) - softmax(t_j/T_w)|_1",
        baseline="kd",
        certainty="verified-in-code",
        deviations="Sinkhorn runs in the log domain (the same numbers, no underflow at a small epsilon). With gradient accumulation "
        "the plan couples the samples of a part. The sample-wise variant of the ablation is not offered.",
    )

    tasks: ClassVar[tuple[str, ...]] = ("classification", "language")

    temperature: float = setting(2.0, "T of the soft cross-entropy, without T^2; the GLUE runs have 1 to 2", above=0)
    alpha: float = setting(0.9, "weight of the soft cross-entropy; the labels get the rest; GLUE: 0.8 to 0.9", at_least=0, at_most=1)
    beta: float = setting(0.8, "weight of the transport; the GLUE runs have 0.8 to 1", at_least=0)
    scale: float = setting(0.001, "unit of the transport term, made for batches of 16 to 32", at_least=0)
    transport_temperature: float = setting(2.0, "T_w of the distributions that are moved; 2 is fixed in the released code", above=0)
    epsilon: float = setting(0.1, "entropy of the plan: small is sharp", above=0)
    iterations: int = setting(20, "rounds of rows and columns", at_least=1)
    block: int = setting(64, "tokens that are moved together, of language models; at most 64 in the paper's decoders", at_least=2)

    def setup(self, pair: Pair) -> None:
        """Nothing to build; refuses tasks whose outputs are no distribution, and teachers that do not tell theirs whole."""
        if self.task.family == "classification":
            self.check_one_class(pair)
        elif not isinstance(pair.teacher_signals.law, Law):
            raise UserError("sinkd moves whole distributions, and a stored top k is none", "use the teacher itself")

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`soft`, `ce` and `transport`; a term of weight 0 is left out."""
        if self.task.family == "language":
            return self._tokens(batch, student.law, teacher.law)
        targets = (wide(teacher.logits) / self.temperature).softmax(-1)
        terms = {"soft": self.alpha * soft_cross_entropy(student.logits, targets, temperature=self.temperature)}
        if self.alpha < 1:
            terms["ce"] = (1 - self.alpha) * self.hard(batch, student.logits)
        if self.beta * self.scale:
            moved = batch_transport(
                student.logits, teacher.logits, temperature=self.transport_temperature, epsilon=self.epsilon, iterations=self.iterations
            )
            terms["transport"] = self.beta * self.scale * moved
        return terms

    def _tokens(self, batch: Batch, student: Law, teacher: Law) -> dict[str, Tensor]:
        """The same of the scored tokens of a language model."""
        terms = {"soft": self.alpha * vocabulary.divergence(student, teacher, "forward", temperature=self.temperature)}
        if self.alpha < 1:
            terms["ce"] = (1 - self.alpha) * self.hard(batch, student)
        if self.beta * self.scale:
            costs = vocabulary.rowwise(self._moved, student, teacher, chunk=self.block)
            terms["transport"] = self.beta * self.scale * costs.sum() / math.ceil(len(student) / self.block)
        return terms

    def _moved(self, student: Tensor, teacher: Tensor) -> Tensor:
        """What moving one block costs, shared by its rows."""
        value = batch_transport(
            student, teacher, temperature=self.transport_temperature, epsilon=self.epsilon, iterations=self.iterations
        )
        return (value / len(student)).expand(len(student))
