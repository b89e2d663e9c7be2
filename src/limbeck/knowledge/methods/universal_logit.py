"""Universal logit distillation: teacher and student with different tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.alignment import Aligned, Aligner
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.losses.transport import sinkhorn_distance
from limbeck.losses.vocabulary import Law, chunk_rows, rowwise
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class UniversalLogit(Distiller):
    """Learn from a teacher that cuts texts into other tokens, by what two next-token distributions have in common without common tokens.

    loss = CE(s, y) + weight * mean over shared places of B(t, s),  B one of
      sorted    sum_r |t_(r) - s_(r)|, probabilities sorted from the largest, the shorter vocabulary filled with zeros
                (ULD, Wasserstein distance with equal costs, arXiv:2402.12030)
      sinkhorn  n * sum_ij P_ij |t_(i) - s_(j)| over the n largest, P an entropic plan with equal masses
                (after MultiLevelOT, arXiv:2412.14528)
      spans     binary KL(t(c) || s(c)) of the same piece of text c, t(c) = exp(sum of its tokens' log-probabilities / T)
                (approximate likelihood matching, arXiv:2503.20083)
    Shared places are those where both tokenizations have a boundary at the same character. The teacher's tokenizer is that of its folder,
    or `teacher.text.tokenizer`.
    """

    card = Card(
        id="universal-logit",
        title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        year=2024,
        arxiv="2402.12030",
        wing="knowledge",
        family="language",
        claim="A student learns from the teacher's distributions although the two have different vocabularies.",
        equation="CE(s, y) + weight mean_i sum_r |sort(t_i)_r - sort(s_i)_r|",
        baseline="alone",
        certainty="recalled",
        deviations="Positions are compared where both tokenizations have a boundary at the same character; the paper pairs the i-th token "
        "of one with the i-th of the other. sinkhorn takes the token level of MultiLevelOT only; spans is without the debiasing of its "
        "paper, and T is 1 where the paper takes 100.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    bridges: ClassVar[bool] = True
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)

    bridge: str = setting("sorted", "what is compared without common tokens", choices=("sorted", "sinkhorn", "spans"))
    weight: float = setting(1.5, "of the bridge, beside the cross-entropy; lambda of ULD", at_least=0)
    temperature: float = setting(1.0, "T of both sides; of spans the divisor of log-probabilities (ALM takes 100)", above=0)
    top: int = setting(50, "of sinkhorn: the n largest probabilities (MultiLevelOT)", at_least=2)
    epsilon: float = setting(0.01, "of sinkhorn: strength of the entropy, in units of probability", above=0)
    iterations: int = setting(20, "of sinkhorn: rounds", at_least=1)

    def setup(self, pair: Pair) -> None:
        """Read the example in both tokenizations, so that texts without shared places are told at once.

        Raises:
            UserError: not one network as teacher, or no shared place.
        """
        networks = list(pair.teacher.networks().values())
        if len(networks) != 1:
            raise UserError(f"{self.card.id} needs one network as teacher, here are {len(networks)}", "name one model as teacher")
        own = pair.data.text
        self._align = Aligner(own, getattr(networks[0], "limbeck_text", None) or own)
        if not len(self._align(pair.example).student):
            raise UserError(
                "the two tokenizations of the first texts have no boundary in common",
                "check the teacher's tokenizer (teacher.text.tokenizer), or give longer texts (text.length)",
            )

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """The student reads its tokens, the teacher the same texts in its own."""
        aligned = self._align(batch)
        said = models.student(batch)
        terms = {"ce": self.hard(batch, said.law)}
        if self.weight:
            teacher = models.teacher(aligned.batch).law.detach()
            terms[self.bridge] = self.weight * self.distance(said.law, teacher, aligned, batch.labels)
        return terms

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """The cross-entropy alone: a teacher's signals of the student's batch are in the wrong tokens; `step` makes both terms."""
        return {"ce": self.hard(batch, student.law)}

    def distance(self, student: Law, teacher: Law, aligned: Aligned, labels: Tensor) -> Tensor:
        """The bridge's term without its weight: a mean over shared places (of spans: over shared pieces), 0 where there are none.

        Args:
            student, teacher: laws of the student's batch and of `aligned.batch`.
            aligned: how they belong together.
            labels: of the student's batch.
        """
        if self.bridge == "spans":
            return self._spans(student, teacher, aligned, labels)
        own, other = student[aligned.student], teacher[aligned.teacher]
        chunk = chunk_rows(max(own.width, other.width), max(1, len(own)))
        values = rowwise(self._sorted if self.bridge == "sorted" else self._moved, own, other, chunk=chunk)
        return values.sum() / max(1, len(own))

    def _sorted(self, student: Tensor, teacher: Tensor) -> Tensor:
        return sorted_distance(student / self.temperature, teacher / self.temperature)

    def _moved(self, student: Tensor, teacher: Tensor) -> Tensor:
        n = min(self.top, student.shape[-1], teacher.shape[-1])
        own, other = (F.softmax(logits / self.temperature, -1).topk(n).values for logits in (student, teacher))
        cost = (own.unsqueeze(-1) - other.unsqueeze(-2)).abs()
        return n * sinkhorn_distance(cost, epsilon=self.epsilon, iterations=self.iterations)

    def _spans(self, student: Law, teacher: Law, aligned: Aligned, labels: Tensor) -> Tensor:
        sides = ((student, labels, aligned.student_chunk), (teacher, aligned.batch.labels, aligned.teacher_chunk))
        sums = []
        for law, own, chunk in sides:
            logs, inside = token_logs(law, self.task.targets(own)), chunk >= 0
            sums.append(logs.new_zeros(aligned.chunks).index_add(0, chunk[inside], logs[inside]) / self.temperature)
        return binary_kl(sums[1].detach(), sums[0]).sum() / max(1, aligned.chunks)


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`(n,)` sum_r |sort(softmax(student))_r - sort(softmax(teacher))_r| of logits `(n, V)` and `(n, W)`; zeros fill the narrower one."""
    own, other = (F.softmax(logits, -1).sort(-1, descending=True).values for logits in (student, teacher))
    width = max(own.shape[-1], other.shape[-1])
    own, other = (F.pad(p, (0, width - p.shape[-1])) for p in (own, other))
    return (own - other).abs().sum(-1)


def token_logs(law: Law, tokens: Tensor) -> Tensor:
    """`(N,)` log-probability of one token a row, a chunk of rows at a time."""
    return rowwise(lambda logits, ids: -F.cross_entropy(logits, ids, reduction="none"), law, tokens)


def binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL between "the text goes on with this piece" and "it does not" under both sides, from log-probabilities `(n,)`."""
    t, s = (logs.clamp(max=-1e-6) for logs in (teacher, student))
    missed_t, missed_s = (torch.log(-torch.expm1(logs)) for logs in (t, s))
    return t.exp() * (t - s) + missed_t.exp() * (missed_t - missed_s)
