"""Thinner experts: every expert of a mixture loses the neurons that matter least, and the model is distilled from the whole one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.structure import experts, pruning
from limbeck.structure.moe import MixtureShaper
from limbeck.structure.shaper import Making


@dataclass
class SlimMoE(MixtureShaper):
    """Keep all experts and the router, make every expert equally thinner, then distil from the original model.

    Neuron i of expert e scores sum |theta dL/dtheta| over its gate row, up row and down column, L the loss of the text, averaged over
    calibration batches; the `width` best of each expert stay (ranked inside the expert, since rarely used experts score low as a whole).
    `groups` keeps whole groups of query heads with their keys and values in the same way. Several cuts are several stages of a recipe.
    """

    card = Card(
        id="slimmoe",
        title="SlimMoE: Structured Compression of Large MoE Models via Expert Slimming and Distillation",
        year=2025,
        arxiv="2506.18349",
        wing="structure",
        family="pruning",
        claim="A 41.9B mixture of experts shrinks to 7.6B and 3.8B with less than a tenth of its training tokens and stays competitive.",
        equation="score_ei = sum |theta dL/dtheta|; -sum_{v in top 8} p_T log q_S + balance",
        baseline="expert-dropping",
        certainty="recalled",
        deviations=(
            "Sensitivity is of the text's loss in every stage. The router's load balancing uses Mixtral's weight. The tokens beside the "
            "top 8 count as one bucket; rest: drop leaves them out, which takes all probability from them and made a small model worse. "
            "Widths go in steps of 8."
        ),
    )

    width: int = setting(0, "neurons that every expert keeps; 0: as many as the budget allows, or half of them", at_least=0)
    groups: int = setting(0, "attention groups that every layer keeps; 0: all", at_least=0)

    def cut(self, student: nn.Module, layers: list[experts.Layer], scores: list[experts.Sensitivity], making: Making) -> nn.Module:
        """The model with `width` neurons an expert and `groups` attention groups."""
        whole, all_groups = experts.expert_width(student), experts.head_groups(student)
        for name, value, most in (("width", self.width, whole), ("groups", self.groups, all_groups)):
            if value > most:
                raise UserError(f"slimmoe: {name} is {value}, and the model has {most}", f"give at most {most}, or 0")
        step = experts.width_step(whole)
        if self.width % step:
            raise UserError(
                f"slimmoe: width is {self.width}, and widths go in steps of {step}",
                "products with stacked experts need rows of a multiple of 16 bytes, which is 8 neurons in half precision",
            )
        groups = [experts.highest(s.groups, self.groups) for s in scores] if self.groups else None

        def at(width: int) -> nn.Module:
            return experts.thinner(student, layers, [experts.highest(s.neurons, width) for s in scores], groups)

        def kept(ratio: float) -> int:
            return max(step, round(whole * (1 - ratio) / step) * step)

        width, budget = self.width or kept(0.5), making.budget
        if not self.width and budget is not None:
            how = f"slimmoe with {self.groups or all_groups} attention groups"
            width = kept(making.decided("ratio", lambda: pruning.smallest_ratio(lambda r: at(kept(r)), making.cost, budget, how)))
        told = f", every layer {self.groups} of {all_groups} attention groups" if groups else ""
        making.session.notes.append(f"every expert keeps {width} of {whole} neurons{told}")
        return at(width)
