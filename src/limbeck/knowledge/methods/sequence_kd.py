"""Sequence-level distillation: the student learns from texts that the teacher writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.data import Data
from limbeck.data.batch import Batch
from limbeck.data.text import PairSplit
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge.asking import Written, ask, pairs_of, with_training, with_written, write
from limbeck.knowledge.distiller import Distiller, Models
from limbeck.knowledge.teachers import EndpointTeacher, FrozenTeacher, Teacher
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.signals.store import model_fingerprint


@dataclass
class SequenceKD(Distiller):
    """The teacher answers every training prompt x once with a text y'; the student is trained on (x, y') as if y' were the reference.

    loss = CE(s(x), y'),  y' = argmax_y t(y | x) (greedily) or drawn from t,  a mean over the tokens of y'
    The mode of the teacher's distribution over whole texts stands for the distribution. The teacher may be a network that reads the
    student's tokens, or a server that only gives texts. A text that the teacher had to break off is learned without its end.
    """

    card = Card(
        id="sequence-kd",
        title="Sequence-Level Knowledge Distillation",
        year=2016,
        arxiv="1606.07947",
        wing="knowledge",
        family="language",
        claim="A student trained on its teacher's texts is better than one trained on the references, and needs no beam search.",
        equation="CE(s(x), y'), y' = argmax_y t(y | x)",
        baseline="alone",
        certainty="recalled",
        deviations="The teacher writes greedily or draws, the paper takes the best of a beam of 5; its interpolation (the text of the "
        "beam that is nearest to the reference) needs a beam and is left out: `mix: both` trains on references and teacher's texts.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    black_box: ClassVar[bool] = True
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ()

    tokens: int = setting(64, "the most tokens that a network writes for a prompt (a server: teacher.endpoint.max_tokens)", at_least=1)
    temperature: float = setting(0.0, "of a network that writes; 0 takes the likeliest token (a server has its own)", at_least=0)
    top_p: float = setting(1.0, "a network draws from the likeliest tokens with this mass", above=0, at_most=1)
    batch: int = setting(16, "prompts that a network answers at a time", at_least=1)
    mix: str = setting("teacher", "train on the teacher's texts, or on both: every prompt once with each", choices=("teacher", "both"))
    drop_empty: bool = setting(True, "leave out prompts whose answer is empty; False: they are an error")

    def prepare(self, data: Data, teacher: Teacher, session: Session, seed: int) -> Data:
        """The data with the teacher's texts in the training part.

        Raises:
            UserError: data without prompts, a teacher that cannot write, empty answers.
        """
        split = pairs_of(data, self.card.id)
        if isinstance(teacher, EndpointTeacher):
            written = ask(teacher.settings, split.prompt_texts(torch.arange(len(split))), session)
        elif isinstance(teacher, FrozenTeacher):
            mark = [data.fingerprint, model_fingerprint(teacher.network)]
            top_p = None if self.top_p == 1 else self.top_p
            options = {"tokens": self.tokens, "temperature": self.temperature, "top_p": top_p, "batch": self.batch}
            written = write(teacher.network, split, session, seed, **options, binding=mark)
        else:
            raise UserError(
                f"{self.card.id} needs one teacher that writes texts, not a {type(teacher).__name__}",
                "name one network as teacher, or a server with teacher.endpoint",
            )
        train = self._train(split, written, session)
        mark = [[item.text, item.whole] for item in written]
        return with_training(data, train, session, [self.card.id, self.mix, self.drop_empty, mark])

    def _train(self, split: PairSplit, written: list[Written], session: Session) -> PairSplit:
        full = [row for row, item in enumerate(written) if item.text.strip()]
        empty = len(written) - len(full)
        if empty and not self.drop_empty:
            raise UserError(f"{empty} of {len(written)} answers of the teacher are empty", "set method.drop_empty=true to leave them out")
        if not full:
            raise UserError("every answer of the teacher is empty", "look at the prompts, or give more tokens (method.tokens, max_tokens)")
        if empty:
            session.notes.append(f"{empty} of {len(written)} prompts are left out: the teacher's answer is empty")
        if cut := sum(not written[row].whole for row in full):
            session.notes.append(f"{cut} of {len(full)} answers were broken off at the most tokens: they are learned without an end")
        answered = split.subset(torch.tensor(full))
        said = [written[row] for row in full]
        if self.mix == "teacher":
            return with_written(answered, said)
        own = [Written(text) for text in split.references(torch.arange(len(split)))]
        both = split.subset(torch.cat([torch.tensor(full), torch.arange(len(split))]))
        return with_written(both, said + own)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """The teacher has said what it has to say: only the student reads the batch."""
        return self.loss(batch, models.student(batch), Signals(), clock)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce` against the teacher's texts."""
        return {"ce": self.hard(batch, student.law)}
