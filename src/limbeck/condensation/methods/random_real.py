"""Random real samples: what every condensed set must beat."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.method import Card


@dataclass
class RandomReal(Condenser):
    """A random subset, the same number of samples of each class; nothing is optimised."""

    card = Card(
        id="random-real",
        title="Random real samples (no condensation)",
        year=2023,
        wing="condensation",
        family="baseline",
        claim="The baseline: what a budget of samples is worth when they are drawn at random.",
        equation="S_c = a random subset of R_c",
        baseline="",
    )

    works_on = ("samples", "graphs")

    def begin(self, problem: Problem) -> SyntheticSet:
        return problem.initial("real")
