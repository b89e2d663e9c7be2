"""B-MTARD: two teachers, one for clean and one for adversarial inputs, kept in balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.views import check_box, pgd
from limbeck.method import Card, setting

TINY = 1e-5
"""What the released code adds inside its logarithms."""


@dataclass
class BMTARD(Distiller):
    """A natural teacher supervises clean inputs, a robust one adversarial inputs; two balancers keep them level.

    loss = w_adv L(s(x'), R(x') / tau_R) + w_nat L(s(x), N(x) / tau_N)
    L(s, b) = mean over batch and classes of b (log(b + 1e-5) - log softmax(s))
    Temperatures move by eta_t until both teachers have equal entropy; weights follow each loss over its first value.
    Inputs are (B, ...) in [0, 1], logits (B, C). The attack is made on the student. Teachers are named `natural` and `robust`.
    """

    card = Card(
        id="b-mtard",
        title="Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher Adversarial Distillation",
        year=2023,
        arxiv="2306.16170",
        wing="knowledge",
        family="adversarial",
        claim="Two balanced teachers give a student that is both accurate and robust, "
        "better than adversarial training and single-teacher distillation.",
        equation="w_adv L(s(x'), R(x')/tau_R) + w_nat L(s(x), N(x)/tau_N)",
        baseline="adversarial-training",
        deviations="Samples without a label are attacked at the natural teacher's choice. "
        "The learning-rate drops of the paper's schedule do not scale eta_w and eta_t. "
        "With training.accumulate the balance moves once for each part of a batch.",
    )
    teacher_names: ClassVar[tuple[str, ...]] = ("natural", "robust")

    eps: float = setting(8 / 255, "radius of the attack (maximum norm), in units of the inputs", above=0)
    attack_step: float = setting(2 / 255, "length of an attack step", above=0)
    attack_steps: int = setting(10, "steps of the attack", at_least=1)
    eta_t: float = setting(0.001, "how far a teacher's temperature moves in a step; 0 switches the entropy balance off (MTARD)", at_least=0)
    eta_w: float = setting(0.025, "how fast the weights follow the losses", at_least=0, at_most=1)
    hottest: float = setting(10.0, "the highest temperature; the lowest is 1", at_least=1)

    def setup(self, pair: Pair) -> None:
        """State, in the order robust, natural: temperatures, weights, and each loss at the first step (NaN before it)."""
        self.check_one_class(pair)
        check_box(pair.example.inputs, self.card.id)
        self.state["tau"] = torch.ones(2, device=pair.device)
        self.state["weights"] = torch.full((2,), 0.5, device=pair.device)
        self.state["first"] = torch.full((2,), float("nan"), device=pair.device)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """Attack, read both teachers and the student twice; the loss has the temperatures before and the weights after this balance."""
        natural = models.teacher.members["natural"](batch).logits.float()
        labels = natural.argmax(-1) if batch.labels is None else torch.where(batch.labelled, batch.labels, natural.argmax(-1))
        attacked = pgd(models.module, batch.inputs, labels, eps=self.eps, step=self.attack_step, steps=self.attack_steps)
        moved = batch.replace(inputs=attacked, index=None)  # no longer the samples that histories and stores know
        robust = models.teacher.members["robust"](moved).logits.float()
        tau = self.state["tau"]
        targets = (robust / tau[0]).softmax(-1), (natural / tau[1]).softmax(-1)
        said = models.student(moved).logits.float().log_softmax(-1), models.student(batch).logits.float().log_softmax(-1)
        losses = [(b * ((b + TINY).log() - a)).mean() for a, b in zip(said, targets)]
        self.balance(torch.stack([(b * (b + TINY).log()).mean() for b in targets]), torch.stack(losses).detach())
        weights = self.state["weights"]
        return {"adversarial": weights[0] * losses[0], "natural": weights[1] * losses[1]}

    @torch.no_grad()
    def balance(self, negative_entropies: Tensor, losses: Tensor) -> None:
        """Move temperatures and weights; both arguments `(2,)` in the order robust, natural.

        The sharper teacher is heated and the other cooled; the loss that has fallen less gets more weight.
        """
        robust, natural = negative_entropies
        lean = torch.sign(natural - robust)  # of the paper's robust / natural - 1, as both are negative; 0 / 0 is no danger here
        self.state["tau"] = (self.state["tau"] - self.eta_t * torch.stack([lean, -lean])).clamp(1, self.hottest)
        first = torch.where(self.state["first"].isnan(), losses, self.state["first"])
        progress = (losses / first.clamp_min(1e-12)).clamp_min(1e-12)
        weights = self.state["weights"] - self.eta_w * (self.state["weights"] - progress / progress.sum())
        weights = weights.clamp_min(0)
        self.state["first"], self.state["weights"] = first, weights / weights.sum()
