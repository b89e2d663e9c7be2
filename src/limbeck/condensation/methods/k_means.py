"""The centres of k-means as samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.selection import centres
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.method import Card, setting


@dataclass
class KMeans(Condenser):
    """Per class, the k-means centres of the samples themselves, or the real samples nearest to them.

    With one sample a class the centre is the mean picture, a strong baseline on simple data.
    """

    card = Card(
        id="k-means",
        title="Least squares quantization in PCM (k-means centres per class)",
        year=1982,
        wing="condensation",
        family="baseline",
        claim="The baseline that needs no network: per class, the centres of its samples.",
        equation="S_c = argmin sum_{x in R_c} min_{s in S_c} |x - s|^2",
        baseline="random-real",
    )

    real: bool = setting(False, "take the real samples nearest to the centres instead of the centres")

    def begin(self, problem: Problem) -> SyntheticSet:
        if self.real:
            return problem.initial("kmeans")
        images = [centres(problem.at(problem.of_class(c)), problem.per_class, problem.seed) for c in range(problem.classes)]
        return problem.make(torch.cat(images), problem.labels())
