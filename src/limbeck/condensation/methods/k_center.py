"""k-center: real samples that cover their class."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.selection import k_center
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.method import Card, setting


@dataclass
class KCenter(Condenser):
    """Per class, real samples chosen greedily so that the farthest other sample is as near as possible."""

    card = Card(
        id="k-center",
        title="Active learning for convolutional neural networks: a core-set approach",
        year=2017,
        wing="condensation",
        family="baseline",
        claim="A coreset that covers the data: the greatest distance to a chosen sample is small.",
        equation="s_k = argmax_x min_{j<k} |x - s_j|, s_1 nearest to the class mean",
        arxiv="1708.00489",
        baseline="random-real",
        certainty="recalled",
        deviations="Features are the standardised inputs, or the embedding of the first teacher where the recipe names one.",
    )

    works_on = ("samples", "graphs")

    features: str = setting("inputs", "what distances are taken of", choices=("inputs", "teacher"))

    def begin(self, problem: Problem) -> SyntheticSet:
        return problem.subset(torch.cat([p[k_center(problem.features(p, self.features), problem.per_class)] for p in problem.positions]))
