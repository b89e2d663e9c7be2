"""DistillSpec: a draft that its target accepts more often, learned on text that the draft writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.on_policy import Writer, own_text, prompts_of
from limbeck.losses import vocabulary
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class DistillSpec(Distiller):
    """The draft q learns the target p on a mixture of its own text and the data's, so that speculative decoding accepts more.

    loss = ratio * mean over scored tokens of D(p, q) + (1 - ratio) * CE(q, y) on the data's own text
    With probability `on_policy` (growing from 0 over the first `ramp` of the run) the texts of a batch are drawn from the draft after the
    data's prompts; no gradient goes through the drawing. D is forward KL, reverse KL, JS(beta) or total variation; acceptance at a place
    is 1 - TV(p, q) (Leviathan et al. 2023, arXiv:2211.17192).
    """

    card = Card(
        id="distillspec",
        title="DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
        year=2023,
        arxiv="2310.08461",
        wing="knowledge",
        family="language",
        claim="Distilling the draft on its own text makes speculative decoding 10 to 45 % faster than with the undistilled draft.",
        equation="E_{y ~ q} mean_l D(p(.|x, y_<l) || q(.|x, y_<l))",
        baseline="alone",
        certainty="recalled",
        deviations="Whether a batch is the draft's own is drawn for each batch, as in the released code of GKD. `ramp` is ours. "
        "Text that the target wrote is the method sequence-kd.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)

    divergence: str = setting(
        "forward",
        "the paper finds no single winner; forward KL is safe, tv is the acceptance itself",
        choices=("forward", "reverse", "js", "tv"),
    )
    beta: float = setting(0.1, "of js", at_least=0, at_most=1)
    on_policy: float = setting(1.0, "share of batches that the draft writes; 1 in the paper, 0.5 in runs of GKD", at_least=0, at_most=1)
    ramp: float = setting(0.0, "share of the run over which `on_policy` grows from 0: a weak draft writes poor text", at_least=0, at_most=1)
    ratio: float = setting(1.0, "weight of the divergence; 0 is plain fine-tuning", at_least=0, at_most=1)
    temperature: float = setting(1.0, "of the drawing, in training and when acceptance is measured; 0 is greedy", at_least=0)
    tokens: int = setting(48, "the most that is written after a prompt", at_least=1)
    prompt: int = setting(16, "tokens of a prompt, of windows of plain text", at_least=1)
    measured: int = setting(16, "test prompts on which acceptance and speed are measured at the end; 0 for none", at_least=0)
    gamma: int = setting(4, "drafted tokens a block when it is measured; 3 to 7 in the paper", at_least=1)

    def setup(self, pair: Pair) -> None:
        """Remember where prompts come from.

        Raises:
            UserError: a stored teacher, which cannot read what the draft writes.
        """
        networks = pair.teacher.networks()
        if not networks and (self.on_policy or self.measured):
            raise UserError(
                "distillspec needs the target itself: stored outputs say nothing of text that the draft writes",
                "name the teacher, or use token-level-kd with the store",
            )
        self._target = next(iter(networks.values()), None)
        self._split, self._text = pair.data.train, pair.data.text
        self._writer = Writer(self.tokens, self.prompt, self.temperature)
        self.state = {"written": 0, "batches": 0}

    def _own(self, clock: Clock) -> bool:
        """Whether this batch is the draft's own; drawn from torch's global generator."""
        done = clock.step / max(clock.total, 1)
        share = self.on_policy if done >= self.ramp else self.on_policy * done / self.ramp
        return self.ratio > 0 and float(torch.rand(())) < share

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """The divergence under its own name, on the draft's text or the data's; and `ce` on the data's."""
        terms: dict[str, Tensor] = {}
        if self.ratio < 1:
            terms["ce"] = (1 - self.ratio) * self.hard(batch, models.student(batch).law)
        if not self.ratio:
            return terms
        self.state["batches"] += 1
        if self._own(clock):
            self.state["written"] += 1
            written = own_text(models.module, self._split, batch, self._writer, self._text, self.task.kind)
            batch.extra["other_items"] = (self.divergence,)
            batch = written.replace(extra={k: v for k, v in batch.extra.items() if k != "share"})
        terms[self.divergence] = self.ratio * self._distance(models.student(batch), models.teacher(batch))
        return terms

    def _distance(self, student: Signals, teacher: Signals) -> Tensor:
        options = {"beta": self.beta} if self.divergence == "js" else {}
        return vocabulary.divergence(student.law, teacher.law, self.divergence, **options)

    def figures(self, student: nn.Module, data: Any, task: Any, device: torch.device) -> dict[str, float]:
        """What the draft is worth to its target on test prompts.

        `alpha`: exact acceptance on text that the target wrote; `block_efficiency`: tokens a pass of the target, by real speculation;
        `speedup`: its wall time against plain decoding, on this machine; `own_text`: share of batches that the draft wrote.
        """
        found = {"own_text": self.state["written"] / max(self.state["batches"], 1)}
        if not self.measured or self._target is None or task.kind != "causal-lm":
            return found
        from limbeck.decoding import speculative_report

        index = torch.arange(min(self.measured, len(data.test)))
        ids, mask = prompts_of(data.test, data.test.batch(index).to(device), self.prompt)
        room = min(self.tokens, self._text.length - ids.shape[1])
        prompts = [row[keep.bool()] for row, keep in zip(ids, mask)]
        report = speculative_report(
            self._target,
            student,
            prompts,
            (self.gamma,),
            new_tokens=max(room, 1),
            temperature=self.temperature,
            eos=self._text.eos,
            vocabulary=self._text.vocabulary,
        )
        block = report.blocks[0]
        return found | {"alpha": report.alpha, "block_efficiency": block.block_efficiency, "speedup": block.speedup}
