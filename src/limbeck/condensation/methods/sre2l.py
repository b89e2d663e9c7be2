"""SRe2L: squeeze the data into a network, recover images from it, and store its labels for every epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.inversion import BatchStatistics, jitter, random_flip, random_resized_crop
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.clock import Clock
from limbeck.errors import unknown
from limbeck.losses.inversion import image_variation
from limbeck.method import Card, setting


@dataclass
class SRe2L(Condenser):
    """Images that a trained network classifies surely and whose BatchNorm inputs have the stored statistics; then labels for each epoch.

    L = CE(T(x'), y) + statistics * (10 d_0 + sum_{l>0} d_l) + variation * TV(x') + energy * mean |x'|, x' = roll(flip(crop(x))), d_l the
    distance of layer l's batch statistics from the running ones; one image of every class in a batch. Then the network's logits on
    E mixed views of the set are stored in half precision, and students replay them: KL at `temperature`, without T^2.
    """

    card = Card(
        id="sre2l",
        title="Squeeze, recover and relabel: dataset condensation at ImageNet scale from a new perspective",
        year=2023,
        wing="condensation",
        family="inversion",
        claim="Decoupling model and data optimisation condenses ImageNet-1K at full resolution.",
        equation="L = CE(T(x'), y) + r_bn sum_l w_l (|var_l - rv_l| + |mean_l - rm_l|)",
        arxiv="2306.13092",
        baseline="random-real",
        deviations=(
            "All images of a class are recovered side by side, each batch with statistics of its own, which changes nothing for Adam. "
            "Labels are stored for whole views of the set instead of batches; views are recomputed from a seed."
        ),
    )
    schedule = "cosine"
    needs_teachers = True
    contract = {"label_epochs": 2, "jitter": 1}

    iterations: int = setting(1000, "steps of the recovery; 0 keeps the first images (paper: 1000 on CIFAR, 4000 on ImageNet)", at_least=0)
    init: str = setting("noise", "where the images start (paper: noise)", choices=("noise", "real", "kmeans"))
    member: str = setting("", "which teacher; empty: the first one")
    lr_images: float = setting(0.25, "Adam's learning rate, to 0 along a cosine (paper: 0.25)", above=0)
    statistics: float = setting(0.01, "weight of the BatchNorm statistics (paper: 0.01)", at_least=0)
    first: float = setting(10.0, "what the first BatchNorm layer counts (paper: 10)", at_least=0)
    crop: bool = setting(True, "look at random parts of the images (paper: on ImageNet, not on CIFAR)")
    min_scale: float = setting(0.08, "least area of a part (paper: 0.08)", above=0, at_most=1)
    flip: bool = setting(False, "mirror at random (paper: on natural images; wrong for digits)")
    jitter: int = setting(4, "roll by up to so many pixels (paper: 4 on CIFAR, 32 on ImageNet)", at_least=0)
    variation: float = setting(0.0, "weight of the total variation (paper: 0)", at_least=0)
    energy: float = setting(0.0, "weight of the images' norm (paper: 0)", at_least=0)
    label_epochs: int = setting(300, "E, epochs for which labels are stored (paper: 300)", at_least=1)
    mix: str = setting("cutmix", "how views are mixed (paper: cutmix on ImageNet, mixup on CIFAR)", choices=("cutmix", "mixup", "none"))
    alpha: float = setting(1.0, "of the mix (paper: 1.0 for cutmix, 0.8 for mixup)", above=0)
    temperature: float = setting(20.0, "T of the students' KL (paper: 20; 30 on CIFAR)", above=0)

    def prepare(self, problem: Problem) -> None:
        self._readers = {name: BatchStatistics(problem.teachers[name], f"teacher {name}") for name in self.used(problem)}

    def used(self, problem: Problem) -> list[str]:
        """The teachers that take part."""
        if self.member and self.member not in problem.teachers:
            raise unknown("teacher", self.member, problem.teachers)
        return [self.member or next(iter(problem.teachers))]

    def learnt(self, set: SyntheticSet) -> nn.Parameter:
        """What is optimised."""
        return set.images

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        return {"set": torch.optim.Adam([self.learnt(set)], self.lr_images, betas=(0.5, 0.9))} if self.iterations else {}

    def least_scale(self, clock: Clock) -> float:
        """The least area of a part at this step."""
        return self.min_scale

    def seen(self, x: Tensor, clock: Clock) -> Tensor:
        """A batch as the network sees it: cropped, mirrored and rolled."""
        if self.crop:
            x = random_resized_crop(x, self.least_scale(clock))
        if self.flip:
            x = random_flip(x)
        return jitter(x, self.jitter)

    def committee(self, group: int, problem: Problem) -> list[tuple[BatchStatistics, float]]:
        """The networks, with their weights, that recover the `group`-th image of every class."""
        return [(reader, 1.0) for reader in self._readers.values()]

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        by_group = set.images.unflatten(0, (problem.classes, -1))
        return self._terms([(by_group[:, g], self.committee(g, problem)) for g in range(by_group.shape[1])], clock)

    def _terms(self, batches: list[tuple[Tensor, list[tuple[BatchStatistics, float]]]], clock: Clock) -> dict[str, Tensor]:
        """Terms of batches that hold one image of each class, in the order of the classes."""
        zero = torch.zeros((), device=batches[0][0].device)
        hard, matched, smooth = zero, zero, zero
        for x, members in batches:
            seen = self.seen(x, clock)
            labels = torch.arange(len(x), device=x.device)
            for reader, weight in members:
                logits, distance = reader(seen, self.first)
                hard = hard + weight * F.cross_entropy(logits, labels)
                matched = matched + weight * distance
            if self.variation or self.energy:
                smooth = smooth + self.variation * image_variation(seen) + self.energy * seen.flatten(1).norm(dim=1).mean()
        terms = {"hard": hard, "statistics": self.statistics * matched}
        return {**terms, "smooth": smooth} if self.variation or self.energy else terms

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        """Pixels stay pixels."""
        low, high = problem.pixel_bounds()
        with torch.no_grad():
            set.images.copy_(torch.minimum(torch.maximum(set.images, low), high))

    def finish(self, set: SyntheticSet, problem: Problem) -> SyntheticSet:
        for reader in self._readers.values():
            reader.close()
        return self.relabelled(set.as_stored(), problem)

    def soften(self, set: SyntheticSet, problem: Problem) -> SyntheticSet | None:
        return self.relabelled(set, problem)

    def relabelled(self, set: SyntheticSet, problem: Problem) -> SyntheticSet:
        """A set with the labels of E mixed views of it."""
        made = set.with_views(seed=problem.seed, mix=None if self.mix == "none" else self.mix, alpha=self.alpha)
        logits = []
        with torch.no_grad():
            for epoch in range(self.label_epochs):
                logits.append(self.labels(made.view(epoch)[0], problem))
        made.store_views(torch.stack(logits), self.temperature)
        return made

    def labels(self, x: Tensor, problem: Problem) -> Tensor:
        """`(N, K)` logits that students learn, of one view."""
        return problem.teachers[self.used(problem)[0]](x)
