"""Fewer experts: whole experts go, the others stay as they are (a baseline)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.structure import experts, pruning
from limbeck.structure.moe import MixtureShaper
from limbeck.structure.shaper import Making


@dataclass
class ExpertDropping(MixtureShaper):
    """Keep the experts of every layer that score highest, with their rows of the router; the same recovery as slimmoe.

    An expert scores the sum of its neurons' first-order Taylor terms.
    """

    card = Card(
        id="expert-dropping",
        title="Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language Models",
        year=2024,
        arxiv="2402.14800",
        wing="structure",
        family="pruning",
        claim="Half of Mixtral's experts can go at a modest loss, with faster inference.",
        equation="keep the experts with the highest sum |theta dL/dtheta|",
        baseline="alone",
        certainty="recalled",
        deviations="Experts are ranked by Taylor scores, then trained; the paper searches the set that rebuilds a layer's output best.",
    )

    keep: int = setting(0, "experts that every layer keeps; 0: as many as the budget allows, or half of them", at_least=0)

    def cut(self, student: nn.Module, layers: list[experts.Layer], scores: list[experts.Sensitivity], making: Making) -> nn.Module:
        """The model with `keep` experts a layer."""
        whole = int(scores[0].neurons.shape[0])
        least = int(student.config.num_experts_per_tok)  # type: ignore[union-attr, arg-type]
        if self.keep and not least <= self.keep <= whole:
            raise UserError(f"expert-dropping: keep is {self.keep}", f"give {least} (they work on every token) to {whole}, or 0")

        def at(number: int) -> nn.Module:
            return experts.fewer_experts(student, layers, [experts.highest(s.neurons.sum(1), number) for s in scores])

        def kept(ratio: float) -> int:
            return max(least, round(whole * (1 - ratio)))

        number, budget = self.keep or max(least, whole // 2), making.budget
        if not self.keep and budget is not None:
            number = kept(
                making.decided("ratio", lambda: pruning.smallest_ratio(lambda r: at(kept(r)), making.cost, budget, "expert-dropping"))
            )
        making.session.notes.append(f"every layer keeps {number} of {whole} experts")
        return at(number)
