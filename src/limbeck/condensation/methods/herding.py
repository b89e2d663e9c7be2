"""Herding: real samples whose mean follows the class mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.selection import herding
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.method import Card, setting


@dataclass
class Herding(Condenser):
    """Per class, real samples chosen greedily so that their mean stays closest to the class mean."""

    card = Card(
        id="herding",
        title="Herding dynamical weights to learn",
        year=2009,
        wing="condensation",
        family="baseline",
        claim="A coreset that keeps the class means.",
        equation="s_k = argmin_x | (s_1 + ... + s_{k-1} + x) / k - mean(R_c) |",
        baseline="random-real",
        certainty="recalled",
        deviations="Features are the standardised inputs, or the embedding of the first teacher where the recipe names one.",
    )

    works_on = ("samples", "graphs")

    features: str = setting("inputs", "what means are taken of", choices=("inputs", "teacher"))

    def begin(self, problem: Problem) -> SyntheticSet:
        return problem.subset(torch.cat([p[herding(problem.features(p, self.features), problem.per_class)] for p in problem.positions]))
