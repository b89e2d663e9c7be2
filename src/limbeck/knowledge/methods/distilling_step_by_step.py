"""Distilling step-by-step: the student learns to give the answer and, as a second task, the reason for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.data import Data
from limbeck.data.batch import Batch
from limbeck.data.choose import hide
from limbeck.data.text import PairSplit
from limbeck.endpoint.rationales import few_shot_prompt, parse_answer
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge.asking import ask, pairs_of, with_training
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.prefixes import check_prefixes, prefixed, with_prefix
from limbeck.knowledge.teachers import EndpointTeacher, Teacher
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals

Reasons = tuple[list[str | None], list[str | None]]
"""For each row a rationale and a teacher's answer, None where there is none."""


@dataclass
class DistillingStepByStep(Distiller):
    """One student, two tasks told apart by the first words of the prompt; only the first task is used afterwards.

    loss = alpha CE(s("predict: " + x), y) + (1 - alpha) CE(s("explain: " + x), r)
    Each CE is a mean over the tokens of its own targets, so that long rationales do not outweigh labels. Of causal students only
    target tokens are scored. A sample without label takes part in the explanation alone, one without rationale in the prediction alone.
    Rationales come from a server (few-shot prompts, answers split at a fixed phrase) or are brought by the data.
    """

    card = Card(
        id="distilling-step-by-step",
        title="Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller Model Sizes",
        year=2023,
        arxiv="2305.02301",
        wing="knowledge",
        family="language",
        claim="Rationales as a second task make small models better than larger ones, with less data than labels alone need.",
        equation="alpha CE(s('predict: ' + x), y) + (1 - alpha) CE(s('explain: ' + x), r)",
        baseline="alone",
        certainty="verified-in-code",
        deviations="Where samples of a batch have no label, the prediction part draws other labelled ones in their place, so that both "
        "parts have the size of the batch; the released code has a label for every sample.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    black_box: ClassVar[bool] = True
    teacher_kind: ClassVar[str] = "none"
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ()

    alpha: float = setting(0.5, "weight of the prediction; 1 learns labels alone", above=0, at_most=1)
    label: str = setting("gold", "what is predicted: the data's completion, or the teacher's answer", choices=("gold", "teacher"))
    labelled: int = setting(0, "training samples whose label may be used, balanced over classes where there are any; 0: all", at_least=0)
    predict: str = setting("predict: ", "in front of prompts that ask for the label, also when the student is measured and used")
    explain: str = setting("explain: ", "in front of prompts that ask for the rationale")
    examples: tuple[tuple[str, str, str], ...] = setting((), "(input, rationale, label) shown to a server; none: what the data brings")
    shots: int = setting(3, "how many of the data's own rationales are shown to a server where `examples` is empty", at_least=1)
    phrase: str = setting("So the answer is", "fixed words between rationale and label in a server's answers")

    def prepare(self, data: Data, teacher: Teacher, session: Session, seed: int) -> Data:
        """Training pairs for both tasks; validation and test split ask for the label.

        Raises:
            UserError: data without prompts, no rationale from anywhere, prefixes that a tokenizer cannot tell apart.
        """
        split = pairs_of(data, self.card.id)
        check_prefixes(split, (self.predict, self.explain))
        rationales, answers = self._reasons(data, split, teacher, session)
        known = self._known(data, split, answers, seed)
        explained = torch.tensor([bool(r) and self.alpha < 1 for r in rationales])
        if self.alpha < 1 and not bool(explained.any()):
            raise UserError("no training sample has a rationale", "name a teacher.endpoint, or data that bring them (explain: tree)")
        rows = (known | explained).nonzero()[:, 0]
        kept = split.subset(rows)
        labels = [(answers[row] if self.label == "teacher" else None) or "" for row in rows.tolist()]
        train = prefixed(kept, self.predict)
        if self.label == "teacher":  # a sample without an answer of the teacher is never asked for it: its own text holds the place
            own = kept.references(torch.arange(len(kept)))
            train = train.with_completions([label or reference for label, reference in zip(labels, own)])
        self._known_rows = known[rows].nonzero()[:, 0]
        self._is_known = known[rows]
        self._explain_row = torch.full((len(rows),), -1).masked_scatter(explained[rows], torch.arange(int(explained.sum())))
        self._explain = None
        if self.alpha < 1:
            chosen = split.subset(explained.nonzero()[:, 0])
            self._explain = prefixed(chosen, self.explain).with_completions([r for r, on in zip(rationales, explained.tolist()) if on])
        counts = f"{int(known.sum())} samples with a label, {int(explained.sum())} with a rationale"
        session.notes.append(f"{counts}; the student's prompts begin with {self.predict!r}, also when it is used")
        mark = [self.card.id, self.values(), rationales, answers, known.tolist(), seed]
        return with_training(self.for_measuring(data), train, session, mark)

    def for_measuring(self, data: Data) -> Data:
        """The student is asked for labels, and the prompt says so."""
        return with_prefix(data, self.predict)

    def _known(self, data: Data, split: PairSplit, answers: list[str | None], seed: int) -> Tensor:
        """`(N,)` bool: which samples have a label that may be used."""
        if self.label == "teacher":
            known = torch.tensor([bool(a) for a in answers])
            if not bool(known.any()):
                raise UserError("method.label is teacher, and the teacher gives no answer", "use label=gold, or another teacher")
        else:
            known = torch.ones(len(split), dtype=torch.bool)
        if not self.labelled:
            return known
        if self.labelled > int(known.sum()):
            what = f"labelled is {self.labelled}, and {int(known.sum())} training samples have a label"
            raise UserError(what, "give fewer, or 0 for all")
        classes = split.classes if split.classes is not None else torch.zeros(len(split), dtype=torch.int64)
        return hide(torch.where(known, classes, torch.full_like(classes, -1)), self.labelled, seed) >= 0

    # ---- where reasons come from ----

    def _reasons(self, data: Data, split: PairSplit, teacher: Teacher, session: Session) -> Reasons:
        brought = split.rationales
        if not isinstance(teacher, EndpointTeacher):
            if self.alpha < 1 and not any(brought or ()):
                raise UserError(
                    f"{self.card.id} needs rationales, and {data.name} brings none",
                    "name a server with teacher.endpoint, or use data that bring them, such as tables-in-words with args.explain=tree",
                )
            none: list[str | None] = [None] * len(split)
            return brought or none, split.teacher_answers or none
        prompts = split.prompt_texts(torch.arange(len(split)))
        shown = [few_shot_prompt(self._examples(split), prompt, self.phrase) for prompt in prompts]
        said = ask(teacher.settings, shown, session)
        allowed = list(data.classes) or None
        parsed = [parse_answer(item.text, self.phrase, allowed) for item in said]
        if bad := [item.text for item, found in zip(said, parsed) if found is None]:
            common = Counter(" ".join(text.split())[:60] for text in bad).most_common(1)[0][0]
            if len(bad) == len(said):
                raise UserError(
                    f"no answer of {teacher.settings.model} is a reason, {self.phrase!r} and a label; one is {common!r}",
                    "look at method.examples, method.phrase and teacher.endpoint.max_tokens; some servers need chat=false",
                )
            session.notes.append(f"{len(bad)} of {len(said)} answers are not well formed and teach nothing, such as {common!r}")
        return [found and found[0] for found in parsed], [found and found[1] for found in parsed]

    def _examples(self, split: PairSplit) -> list[tuple[str, str, str]]:
        """What is shown to the server: the recipe's examples, or some of the data's own."""
        if self.examples:
            return list(self.examples)
        brought = split.rationales or []
        rows = [row for row, reason in enumerate(brought) if reason][: self.shots]
        if not rows:
            raise UserError(
                "a few-shot prompt needs examples, and the data bring no rationales",
                "write method.examples: [[input, rationale, label], ...]",
            )
        index = torch.tensor(rows)
        return [(p, brought[row] or "", c) for row, p, c in zip(rows, split.prompt_texts(index), split.references(index))]

    # ---- training ----

    def setup(self, pair: Pair) -> None:
        """Nothing to build; the pairs of both tasks are those of `prepare`."""
        if not hasattr(self, "_known_rows"):
            what = f"{self.card.id} is made ready by `prepare`, which was not called"
            raise UserError(what, "call method.prepare(data, teacher, session, seed) first")
        self._data = pair.data.train

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """Two forward passes of the student: `predict`, and `explain` unless the prediction has all the weight."""
        assert batch.index is not None
        device, index = batch.index.device, batch.index.cpu()
        terms = {"predict": self.alpha * self._read(self._labelled(batch, index, device), models)}
        if self._explain is not None:
            rows = self._explain_row[index]
            rows = rows[rows >= 0]
            if len(rows):
                terms["explain"] = (1 - self.alpha) * self._read(self._explain.batch(rows).to(device), models)
            else:
                terms["explain"] = terms["predict"] * 0
        return terms

    def _labelled(self, batch: Batch, index: Tensor, device: torch.device) -> Batch:
        """The batch with labelled samples in the place of those without label."""
        free = ~self._is_known[index]
        if not bool(free.any()):
            return batch
        drawn = self._known_rows[torch.randint(len(self._known_rows), (int(free.sum()),))]
        return self._data.batch(index.masked_scatter(free, drawn)).to(device)

    def _read(self, batch: Batch, models: Models) -> Tensor:
        return self.hard(batch, models.student(batch).law)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """The prediction alone, for a batch that was read already; `step` makes both parts."""
        return {"predict": self.hard(batch, student.law)}
