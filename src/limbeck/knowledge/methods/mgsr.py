"""MGSR: text of the student corrected at its worst token, a clipped KL, and agreement inside spans of words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.on_policy import Writer
from limbeck.knowledge.revision import Reviser
from limbeck.knowledge.word_spans import neighbours, pieces
from limbeck.losses import vocabulary
from limbeck.losses.vocabulary import Law
from limbeck.method import Card, setting

LEAST = 0.5
"""The least teacher's mass between the bounds: a network that minimises the clipped KL would else clip to where both sides agree."""


class ClipNetwork(nn.Module):
    """Bounds of the part of a teacher's distribution that is learned from: two layers, sigmoids at the end.

    l = (1 - 0.5) sigmoid(a),  u = l + 0.5 + (1 - 0.5 - l) sigmoid(b): 0 <= l, l + 0.5 <= u <= 1.  It begins with almost everything kept.

    Args:
        top: k, how many of the teacher's likeliest tokens it sees, with both sides' probabilities: `(n, 2k)`.
        hidden: width of the hidden layer.
    """

    def __init__(self, top: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * top, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        with torch.no_grad():
            self.layers[2].bias.copy_(torch.tensor([-4.0, 4.0]))

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """l and u, `(n, 1)` each."""
        low, high = self.layers(seen).sigmoid().split(1, -1)
        low = (1 - LEAST) * low
        return low, low + LEAST + (1 - LEAST - low) * high


def clipped_kl(student: Tensor, teacher: Tensor, target: Tensor, clip: nn.Module, top: int, width: float) -> tuple[Tensor, Tensor]:
    """KL between both laws on the tokens that the clip network keeps, each normalised there (DAC-KL).

    With p sorted downwards and c_v the teacher's mass in front of v: w_v = sigmoid((c_v - l) / k) sigmoid((u - c_v) / k), 1 at the label;
    p~ = w p / sum w p, q~ = w q / sum w q, value sum p~ log(p~ / q~).

    Args:
        student, teacher: `(n, V)` logits.
        target: `(n,)` labels.
        clip: gives l and u from `(n, 2 top)` probabilities, the teacher's first; see `ClipNetwork`.
        top: tokens that `clip` sees; fewer where V is smaller.
        width: k of the soft membership.

    Returns:
        Values `(n,)` and kept bounds u - l `(n,)`.
    """
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    log_p, order = log_p.sort(dim=-1, descending=True, stable=True)
    log_q = log_q.gather(1, order)
    seen = torch.cat([log_p[:, :top], log_q[:, :top].detach()], 1).exp()
    low, high = clip(seen)
    p = log_p.exp()
    before = p.cumsum(-1) - p
    log_w = logsigmoid((before - low) / width) + logsigmoid((high - before) / width)
    log_w = log_w.masked_fill(order == target.unsqueeze(1), 0.0)
    kept_p, kept_q = (log_p + log_w).log_softmax(-1), (log_q + log_w).log_softmax(-1)
    return (kept_p.exp() * (kept_p - kept_q)).sum(-1), (high - low).squeeze(1)


def span_gap(student: Tensor, other_student: Tensor, teacher: Tensor, other_teacher: Tensor) -> Tensor:
    """`(n,)` || p_i p_(i+1) - q_i q_(i+1) ||^2 over the vocabulary, products from log-probabilities; all arguments are logits `(n, V)`."""
    p = (teacher.log_softmax(-1) + other_teacher.log_softmax(-1)).exp()
    q = (student.log_softmax(-1) + other_student.log_softmax(-1)).exp()
    return (p - q).square().sum(-1)


@dataclass
class MGSR(Distiller):
    """Sequence: the student's text is cut at its worst token, which the teacher replaces, and the student writes on. Token: a clipped KL.
    Span: products of neighbouring distributions agree inside words and phrases.

    loss = sft CE(q, data) + dac mean_l KL(p~_l || q~_l) + span mean_spans mean_i || p_i p_(i+1) - q_i q_(i+1) ||^2
    error token j = argmax over {i : y_i is not the teacher's choice} of KL(p_i || q_i); none: the text stays as it is.
    The last two terms are taken on the data's text, or with probability `revised` on corrected text: new, or from a buffer with a
    probability that grows from 0 to 1 over the run. f and the student share one loss; gradients reach f through soft membership.
    """

    card = Card(
        id="mgsr",
        title="Multi-Granularity Semantic Revision for Large Language Model Distillation",
        year=2024,
        arxiv="2407.10068",
        wing="knowledge",
        family="language",
        claim="Correcting the student's text and revising the loss of tokens and spans beats other methods from 0.1B to 13B parameters.",
        equation="CE + KL(p~ || q~) on f's clip of p + || p_i p_(i+1) - q_i q_(i+1) ||^2 in spans, on text corrected at argmax KL(p || q)",
        baseline="distillspec",
        certainty="inferred-from-abstract",
        deviations="How gradients reach f is not told: membership is soft in the teacher's cumulated mass. u - l is at least 0.5, and f "
        "begins with nearly everything kept. The share of corrected text is ours. Spans are a regular expression's (prepositional groups, "
        "words, dotted identifiers) in place of a trained chunker's. Several corrections of a text go from left to right.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)

    sft_weight: float = setting(1.0, "weight of the cross-entropy on the data's text", at_least=0)
    dac_weight: float = setting(1.0, "weight of the clipped KL", at_least=0)
    span_weight: float = setting(1.0, "weight of the spans' products", at_least=0)
    clip: bool = setting(True, "False: forward KL in place of the clipped one")
    corrections: int = setting(1, "for each text; 3 or 5 bring little in the paper, 0 leaves the student's own text", at_least=0)
    mlp_hidden: int = setting(64, "width of the clip network", at_least=1)
    clip_lr: float = setting(1e-3, "learning rate of the clip network; not told in the paper", above=0)
    soft_width: float = setting(0.02, "k of the soft membership, in units of probability; ours", above=0)
    top: int = setting(64, "likeliest tokens that the clip network sees; ours", at_least=1)
    revised: float = setting(0.5, "share of batches with corrected text; not told in the paper", at_least=0, at_most=1)
    buffer: int = setting(64, "batches of corrected text that are kept; 0 writes new text each time (on-policy)", at_least=0)
    temperature: float = setting(1.0, "of the student's writing", at_least=0)
    tokens: int = setting(48, "the most that is written after a prompt", at_least=1)
    prompt: int = setting(16, "tokens of a prompt, of windows of plain text", at_least=1)

    def setup(self, pair: Pair) -> None:
        """The clip network, the buffer, and where prompts come from.

        Raises:
            UserError: sequence-to-sequence, or a stored teacher, which cannot read new text.
        """
        if self.task.kind != "causal-lm":
            raise UserError(f"mgsr corrects texts of causal models, and this is a {self.task.kind} task", "use distillspec")
        if not pair.teacher.networks():
            raise UserError("mgsr needs the teacher itself: stored outputs say nothing of new text", "name the teacher")
        text = pair.data.text
        self._split, self._pieces = pair.data.train, pieces(text.tokenizer)
        self._reviser = Reviser(Writer(self.tokens, self.prompt, self.temperature), self.corrections, text)
        self._top = min(self.top, text.vocabulary)
        if self.clip:
            self.parts["clip"] = ClipNetwork(self._top, self.mlp_hidden)
        self.state = {"buffer": [], "next": 0, "written": 0, "corrected": torch.zeros((), dtype=torch.int64, device=pair.device)}
        self.state |= {"texts": 0, "kept": torch.zeros((), device=pair.device), "batches": 0}

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """One for both; the clip network has its own learning rate."""
        groups: list[dict[str, Any]] = [{"params": [p for p in pair.student.parameters() if p.requires_grad]}]
        if self.clip:
            groups.append({"params": list(self.parts.parameters()), "lr": self.clip_lr, "weight_decay": 0.0})
        return {"student": make_optimizer(pair.training, groups)}

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """`ce` on the data; `dac` (or `kl`) and `span` on corrected text or the data."""
        terms: dict[str, Tensor] = {}
        own = self.revised > 0 and float(torch.rand(())) < self.revised
        student = models.student(batch) if self.sft_weight or not own else None
        if self.sft_weight:
            terms["ce"] = self.sft_weight * self.hard(batch, student.law)
        if not self.dac_weight and not self.span_weight:
            return terms
        if own:
            batch = self._revised(batch, models, clock)
            student = models.student(batch)
        teacher = models.teacher(batch)
        return terms | self._terms(batch, student.law, teacher.law)

    def _terms(self, batch: Batch, student: Law, teacher: Law) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.dac_weight and not self.clip:
            terms["kl"] = self.dac_weight * vocabulary.divergence(student, teacher, "forward")
        elif self.dac_weight:
            terms["dac"] = self.dac_weight * self._clipped(student, teacher.detach(), self.task.targets(batch.labels))
        rows, weight = neighbours(batch.labels, self._pieces)
        if self.span_weight and len(rows):
            pairs = (student[rows + 1], teacher.detach()[rows], teacher.detach()[rows + 1])
            terms["span"] = self.span_weight * (vocabulary.rowwise(span_gap, student[rows], *pairs) * weight).sum()
        return terms

    def _clipped(self, student: Law, teacher: Law, targets: Tensor) -> Tensor:
        clip, kept = self.parts["clip"], []

        def value(z: Tensor, t: Tensor, target: Tensor) -> Tensor:
            values, bounds = clipped_kl(z, t, target, clip, self._top, self.soft_width)
            kept.append(bounds.detach().sum())
            return values

        values = vocabulary.rowwise(value, student, teacher, targets)
        self.state["kept"] = self.state["kept"] + torch.stack(kept).sum() / max(len(values), 1)
        self.state["batches"] += 1
        return values.mean() if len(values) else values.sum()

    def _revised(self, batch: Batch, models: Models, clock: Clock) -> Batch:
        """Corrected text: with a falling probability new, in place of the oldest of the buffer, else a batch of the buffer."""
        kept = self.state["buffer"]
        done = clock.step / max(clock.total, 1)
        if kept and self.buffer and float(torch.rand(())) < done:
            row = kept[int(torch.randint(len(kept), ()))]
            inputs = {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]}
            return Batch(inputs, row["labels"], batch.index, {})
        made, corrected = self._reviser(models, self._split, batch)
        self.state["corrected"] = self.state["corrected"] + corrected
        self.state["written"] += 1
        self.state["texts"] += len(batch)
        if self.buffer:
            row = {**made.inputs, "labels": made.labels}
            if len(kept) < self.buffer:
                kept.append(row)
            else:
                kept[self.state["next"]] = row
            self.state["next"] = (self.state["next"] + 1) % self.buffer
        return made

    def figures(self, student: nn.Module, data: Any, task: Any, device: torch.device) -> dict[str, float]:
        """`written`: batches of text that the student wrote; `corrected`: share of texts with an error token, a correction each;
        `kept_mass`: mean of the clip's u - l.
        """
        found = {"written": float(self.state["written"]), "corrected": float(self.state["corrected"]) / max(self.state["texts"], 1)}
        if self.clip and self.state["batches"]:
            found["kept_mass"] = float(self.state["kept"]) / self.state["batches"]
        return found
