"""Distribution matching: class means of random features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.matching import RandomEncoder, class_signals, embedding_distance, sides
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.clock import Clock
from limbeck.method import Card, setting


@dataclass
class DistributionMatching(Condenser):
    """Match the mean embedding of each class, real against synthetic, in a new random network at every step.

    L = sum_c | mean_{x in R_c} psi(A(x)) - mean_{s in S_c} psi(A(s)) |^2, summed over features; psi is the inner network up to its
    classifier with random frozen weights, A one siamese change drawn for each class (the recipe's `condense.siamese`).
    """

    card = Card(
        id="distribution-matching",
        title="Dataset condensation with distribution matching",
        year=2021,
        wing="condensation",
        family="distribution",
        claim="Without bi-level optimisation, matching feature means is as good as matching gradients, at a fraction of the cost.",
        equation="L = sum_c | mean_{R_c} psi(A(x)) - mean_{S_c} psi(A(s)) |^2,  psi ~ random network",
        arxiv="2110.04181",
        baseline="random-real",
    )
    contract = {"batch_real": 8}

    iterations: int = setting(20000, "outer steps (paper: 20000)", at_least=1)
    lr_images: float = setting(1.0, "learning rate of the images; it belongs to a sum over features (paper: 1)", above=0)
    momentum: float = setting(0.5, "of the images' SGD (paper: 0.5)", at_least=0, at_most=0.999)
    batch_real: int = setting(256, "real samples of each class in a step (paper: 256)", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._encoder = RandomEncoder()

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        return {"set": torch.optim.SGD([set.images], self.lr_images, self.momentum)}

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        both = sides(set, problem, self.batch_real, self.views)
        reader = self._encoder(problem, "embedding")
        with torch.no_grad():
            (real,) = class_signals(problem, reader, both.real, both.real_counts, lambda signals: [signals.embedding])
        return {"means": embedding_distance(problem, reader, both.synthetic, both.counts, real)}
