"""DATM: match the part of training whose difficulty fits the size of the set, with soft labels that are learnt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.condensation.methods.ftd import CHUNK, FTD
from limbeck.condensation.problem import Problem
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.data.choose import generator
from limbeck.engine.clock import Clock
from limbeck.method import Card, setting


@dataclass
class DATM(FTD):
    """Trajectory matching whose start epochs lie in a window chosen by the size of the set, widened while it runs.

    t ~ Uniform[min_start, U_i), U_i = min(start_now + (max_start - start_now) i / expand_over, max_start). Early epochs teach easy
    patterns, which is all that a tiny set can hold; larger sets need late ones. Labels are logits q, learnt with the images: the inner
    loss is -sum softmax(q) log softmax(f). They begin as the mean logits of the experts that classify the image rightly. A step whose
    distance is above `threshold` changes nothing.
    """

    card = Card(
        id="datm",
        title="Towards lossless dataset distillation via difficulty-aligned trajectory matching",
        year=2023,
        wing="condensation",
        family="trajectory",
        claim="Matching late trajectories scales trajectory matching to large synthetic sets, lossless for the first time.",
        equation="t ~ U[min_start, U_i);  inner loss -sum softmax(q) log softmax(f(x)), q learnt",
        arxiv="2310.05773",
        baseline="trajectory-matching",
        deviations=(
            "An image that no expert classifies rightly begins with the mean logits of all. No moving average of the images (the code "
            "lists one and never uses it)."
        ),
    )
    contract = {**FTD.contract, "start_now": 1, "expand_over": 2, "threshold": 10.0}

    init: str = setting(
        "correct", "where the images start; correct: real images that an expert classifies rightly", choices=("correct", "real", "kmeans")
    )
    start_now: int = setting(0, "upper end of the window at the beginning; 0: max_start at once", at_least=0)
    expand_over: int = setting(1000, "outer steps in which the window grows to max_start (paper: 1000 to 2000)", at_least=1)
    soft: bool = setting(True, "learn soft labels (paper: yes)")
    lr_labels: float = setting(5.0, "learning rate of the labels' logits (paper: 2 to 10)", at_least=0)
    momentum_labels: float = setting(0.9, "of the labels' SGD (paper: 0.9)", at_least=0, at_most=0.999)
    threshold: float = setting(1.0, "steps whose distance is above it change nothing (paper: 1.0)", above=0)
    alpha: float = setting(0.3, "weight of the surrogate gap in the experts' GSAM (paper: 0.3)", at_least=0)
    ema: float = setting(0.0, "decay of the images' moving average; 0: none (paper: none)", at_least=0, at_most=0.99999)

    def starts(self, clock: Clock) -> tuple[int, int]:
        now = self.start_now or self.max_start
        upper = min(now + int((self.max_start - now) * clock.step / self.expand_over), self.max_start)
        return self.min_start, max(upper, self.min_start + 1)

    def begin(self, problem: Problem) -> SyntheticSet:
        made = self._correct(problem) if self.init == "correct" else problem.initial(self.init)
        self._average, self._remains = made.images.detach().clone(), 0.0
        self._before: list[Tensor] | None = None
        if self.soft:
            made = self.soften(made, problem)
            assert made is not None
            assert made.logits is not None
        return self._with_rate(made, problem)

    def _last_logits(self, x: Tensor) -> Tensor:
        """`(experts, B, K)` of every expert's last weights."""
        found = []
        with torch.no_grad():
            for expert in range(len(self._buffer)):
                weights = self._buffer.trajectory(expert)[-1]
                found.append(torch.cat([self._functional(weights, part) for part in x.split(CHUNK)]))
        return torch.stack(found)

    def _correct(self, problem: Problem) -> SyntheticSet:
        """Per class, the first images of a random order that an expert classifies rightly; experts are tried in turn."""
        own, chosen = generator(problem.seed, 11), []
        for c, positions in enumerate(problem.positions):
            order = positions[torch.randperm(len(positions), generator=own)]
            right = (self._last_logits(problem.at(order)).argmax(2) == c).cpu()
            ranked = right.int().argmax(0) + len(right) * (~right.any(0)).int()  # the first expert that is right; none comes last
            chosen.append(order[ranked.argsort(stable=True)[: problem.per_class]])
        return problem.subset(torch.cat(chosen))

    def soften(self, set: SyntheticSet, problem: Problem) -> SyntheticSet | None:
        """Consensus labels: the mean logits of the experts that are right about a sample, of all where none is."""
        if not self.soft:
            return None
        other = set.copy()
        x, y = other.decode()
        z = self._last_logits(x.detach())
        right = (z.argmax(2) == y).float().unsqueeze(2)
        right = torch.where(right.sum(0, keepdim=True) > 0, right, torch.ones_like(right))
        other.logits = nn.Parameter((right * z).sum(0) / right.sum(0))
        other.how = {**other.how, "loss": "soft_ce", "temperature": 1.0}
        return other

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        self._optimizer = super().optimizers(set)["set"]
        if set.logits is not None:
            self._optimizer.add_param_group({"params": [set.logits], "lr": self.lr_labels, "momentum": self.momentum_labels})
        return {"set": self._optimizer}

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        found = super().losses(turn, set, problem, clock)
        self._before = None
        if float(found["trajectory"].detach()) > self.threshold:
            self._before = [tensor.detach().clone() for tensor in self._state(set)]
        return found

    def _state(self, set: SyntheticSet) -> list[Tensor]:
        """Everything that an optimiser step changes."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        buffers = [self._optimizer.state[p].get("momentum_buffer") for p in parameters]
        return [*parameters, *(b for b in buffers if b is not None)]

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        """A step whose student ended farther from its target than it began is taken back, momentum included."""
        if self._before is not None:
            now = self._state(set)
            with torch.no_grad():
                for tensor, old in zip(now, self._before):
                    tensor.copy_(old)
                for fresh in now[len(self._before) :]:  # momentum that this very step made
                    fresh.zero_()
        super().after_step(set, problem, clock)
