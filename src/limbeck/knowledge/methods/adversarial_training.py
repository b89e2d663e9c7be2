"""Adversarial training: labels alone, on attacked inputs. A baseline, and how robust teachers are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.views import check_box, pgd
from limbeck.method import Card, setting


@dataclass
class AdversarialTraining(Distiller):
    """Cross-entropy on inputs that were moved against the present network.

    loss = CE(s(x'), y), x' = PGD on CE(s, y) within `eps` (maximum norm). Inputs are (B, ...) in [0, 1].
    """

    card = Card(
        id="adversarial-training",
        title="Towards Deep Learning Models Resistant to Adversarial Attacks",
        year=2017,
        arxiv="1706.06083",
        wing="knowledge",
        family="baseline",
        claim="Training on the worst inputs within a small ball makes a network robust against attacks of that size.",
        equation="CE(s(x'), y), x' = argmax within the ball of CE(s, y)",
        baseline="alone",
        certainty="recalled",
        deviations="The attack starts from small normal noise (as in b-mtard's code), not from a uniform place in the ball.",
    )
    teacher_kind: ClassVar[str] = "none"
    teacher_wants: ClassVar[tuple[str, ...]] = ()
    labelled_only: ClassVar[bool] = True

    eps: float = setting(8 / 255, "radius of the attack, in units of the inputs (CIFAR's habit)", above=0)
    attack_step: float = setting(2 / 255, "length of an attack step", above=0)
    attack_steps: int = setting(10, "steps of the attack", at_least=1)

    def setup(self, pair: Pair) -> None:
        """Nothing to build; the attack needs one class of several and inputs in [0, 1]."""
        self.check_one_class(pair)
        check_box(pair.example.inputs, self.card.id)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """`ce` on the attacked batch."""
        assert batch.labels is not None
        moved = pgd(models.module, batch.inputs, batch.labels, eps=self.eps, step=self.attack_step, steps=self.attack_steps)
        return {"ce": self.hard(batch, models.student(batch.replace(inputs=moved)).logits)}
