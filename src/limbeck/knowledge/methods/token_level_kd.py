"""Token-level distillation of language models: one method, the divergence is a setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import vocabulary
from limbeck.losses.vocabulary import Sparse
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals

_SHAPED = {"js": ("beta",), "skew": ("skew",), "skew-reverse": ("skew",), "alpha-beta": ("alpha", "beta"), "alpha": ("alpha",)}
"""Which shape settings each divergence takes."""


@dataclass
class TokenLevelKD(Distiller):
    """At every scored token the student's next-token distribution is moved towards the teacher's.

    loss = (1 - ratio) * CE(s, y) + ratio * mean over scored tokens of D(t, s),  D one of
      forward KL(t || s)          covers all that the teacher finds likely (Kim & Rush 2016, arXiv:1606.07947, at the level of words)
      reverse KL(s || t)          avoids what the teacher finds unlikely (MiniLLM, arXiv:2306.08543, without its policy gradient)
      js      beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s   (GKD, arXiv:2306.13649)
      skew, skew-reverse   KL(t || a t + (1 - a) s), KL(s || (1 - a) t + a s)      (DistiLLM, arXiv:2402.03898)
      adaptive   forward and reverse KL weighted by the gap in the head and in the tail of t   (AKL, arXiv:2404.02657)
      alpha-beta, alpha, tv   (ABKD, arXiv:2503.04938; Amari; f-distill, arXiv:2307.15190)
    Logits (N, V) are never built: the loss runs from hidden states and output matrices in chunks. The teacher may be live or stored
    (`limbeck cache`); of a stored top k the rest of the vocabulary is one bucket.
    """

    card = Card(
        id="token-level-kd",
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (its supervised form)",
        year=2023,
        arxiv="2306.13649",
        wing="knowledge",
        family="language",
        claim="A student trained on the teacher's distribution at every token is better than one trained on the text alone.",
        equation="(1 - ratio) CE(s, y) + ratio mean_i D(t_i, s_i)",
        baseline="alone",
        certainty="verified-in-code",
        deviations="The supervised form only; text that the student writes itself belongs to distillspec.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)

    divergence: str = setting(
        "forward",
        "which divergence; GKD finds no single winner, forward KL is the usual one",
        choices=("forward", "reverse", "js", "skew", "skew-reverse", "adaptive", "alpha-beta", "alpha", "tv"),
    )
    ratio: float = setting(1.0, "weight of the teacher's term; the text itself gets the rest", at_least=0, at_most=1)
    temperature: float = setting(1.0, "T of both distributions, without T^2: language models are distilled at 1", above=0)
    beta: float = setting(0.5, "of js (0 forward, 1 reverse KL; GKD tries 0.1, 0.5, 0.9) and of alpha-beta", at_least=0, at_most=1)
    skew: float = setting(0.1, "share of the own distribution in the mixture of skew KL (DistiLLM)", at_least=0, at_most=1)
    alpha: float = setting(0.5, "of alpha and alpha-beta", at_least=0, at_most=1)
    rest: str = setting("bucket", "what a stored top k says of all other tokens: one bucket, or nothing", choices=("bucket", "renormalise"))

    def setup(self, pair: Pair) -> None:
        """Nothing to build; tries the divergence on the example, so that what a stored teacher cannot give is said at once."""
        said = pair.student_signals.law
        self._distance(said[:1].detach(), pair.teacher_signals.law[:1])

    def _distance(self, student: Any, teacher: Any) -> Tensor:
        options: dict[str, Any] = {name: getattr(self, name) for name in _SHAPED.get(self.divergence, ())}
        if isinstance(teacher, Sparse):
            options["rest"] = self.rest
        return vocabulary.divergence(student, teacher, self.divergence, temperature=self.temperature, **options)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """The divergence under its own name, and `ce` unless the teacher has all the weight."""
        if len(student.law) != len(teacher.law):
            raise UserError("teacher and student speak of different tokens", "give both the same tokenizer, or use universal-logit")
        terms = {self.divergence: self.ratio * self._distance(student.law, teacher.law)} if self.ratio else {}
        if self.ratio < 1:
            terms["ce"] = (1 - self.ratio) * self.hard(batch, student.law)
        return terms
