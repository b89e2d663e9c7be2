"""CV-DD: images recovered from a committee, labelled with statistics of their own batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.condensation.inversion import BatchStatistics, committee_weights
from limbeck.condensation.methods.sre2l import SRe2L
from limbeck.condensation.problem import Problem
from limbeck.data.choose import generator
from limbeck.errors import UserError
from limbeck.method import Card, setting


@dataclass
class CVDD(SRe2L):
    """SRe2L guided by several networks whose losses count by how good a set each of them makes alone.

    L = sum_i w_i (CE_i + statistics BN_i), w = softmax(p / 5) over the members chosen for an image, p their priors in percent. Soft labels
    (BSSL): all teachers in training mode, so that BatchNorm uses the statistics of the view's halves; z = sum_i softmax(p / 10)_i M_i(x).
    """

    card = Card(
        id="cv-dd",
        title="Dataset distillation via committee voting",
        year=2025,
        wing="condensation",
        family="inversion",
        claim="A committee gives more reliable and better generalising sets than single networks.",
        equation="L = sum_i softmax(p / 5)_i (CE_i + r BN_i);  labels: sum_i softmax(p / 10)_i M_i(x) with batch statistics",
        arxiv="2501.07575",
        baseline="sre2l",
        deviations=(
            "Images start from real samples instead of collages of patches. The students' smoothed schedule is left to the recipe, because "
            "every set must be judged by one schedule."
        ),
    )

    init: str = setting("real", "where the images start (paper: real patches)", choices=("real", "noise", "kmeans"))
    selected: int = setting(2, "members that recover each image (paper: 2)", at_least=1)
    priors: dict = setting({}, "accuracy in percent of a set made by each teacher alone; none: equal votes")  # noqa: RUF009
    vote_temperature: float = setting(5.0, "of the members' weights (paper: 5)", above=0)
    label_vote_temperature: float = setting(10.0, "of the teachers' weights in the labels (paper: 10)", above=0)
    batch_statistics: bool = setting(True, "teachers label in training mode (paper: yes); else as they are")

    def used(self, problem: Problem) -> list[str]:
        if self.member:
            return super().used(problem)
        if self.selected > len(problem.teachers):
            raise UserError(
                f"cv-dd selects {self.selected} members of {len(problem.teachers)} teacher(s)",
                "name more teachers, or lower method.selected",
            )
        return list(problem.teachers)

    def prepare(self, problem: Problem) -> None:
        # copies, made before the readers' hooks: training mode must not move the running statistics of the teachers themselves
        self._live = {name: _training_copy(problem.teachers[name]) for name in self.used(problem)}
        super().prepare(problem)

    def committee(self, group: int, problem: Problem) -> list[tuple[BatchStatistics, float]]:
        names = list(self._readers)
        order = torch.randperm(len(names), generator=generator(problem.seed, 51, group)).tolist()
        chosen = [names[i] for i in order[: 1 if self.member else self.selected]]
        weights = committee_weights(self.priors, chosen, self.vote_temperature)
        return [(self._readers[name], weight) for name, weight in zip(chosen, weights)]

    def labels(self, x: Tensor, problem: Problem) -> Tensor:
        names = self.used(problem)
        weights = committee_weights(self.priors, names, self.label_vote_temperature)
        total = torch.zeros(len(x), problem.classes, device=x.device)
        for name, weight in zip(names, weights):
            if self.batch_statistics:
                half = (len(x) + 1) // 2
                total = total + weight * torch.cat([self._live[name](part) for part in x.split(half)])
            else:
                total = total + weight * problem.teachers[name](x)
        return total


def _training_copy(network: nn.Module) -> nn.Module:
    """A copy in training mode whose running statistics stay as they are, so that labels do not depend on their order."""
    other = copy.deepcopy(network).train().requires_grad_(False)
    for module in other.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return other
