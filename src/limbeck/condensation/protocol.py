"""The one fair way in which every set of this wing is judged (DC-BENCH, arXiv:2207.09639; DD-Ranking).

Fresh students, the same recipe and the same choice of learning rate for every set, several architectures, the last step and never the
best one; random real images get the same soft labels that a method gives its own. Sets are judged as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import schema, storage, zoo
from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.scoring import BaseProtocol, Score, augmentation_robust, label_robust
from limbeck.condensation.students import Lessons, lessons, real_lessons, said, train_students
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.errors import UserError
from limbeck.tasks import Classification


class Protocol(BaseProtocol):
    """Scores synthetic sets of pictures or tables.

    Args:
        problem: the real data.
        recipe: the recipe, for its `condense`, `evaluation` and `student` blocks.
    """

    problem: Problem

    def __init__(self, problem: Problem, recipe: schema.Recipe) -> None:
        super().__init__(problem, recipe)
        self.task = Classification(problem.data.classes)
        self._cached: dict[str, tuple[Tensor, Tensor]] = {}

    def make(self, spec: schema.Model, outputs: int | None) -> nn.Module:
        problem = self.problem
        if spec is self._specs[self.inner]:
            return problem.network(outputs=outputs)
        args = {"input_shape": problem.input_shape, "classes": outputs or problem.classes, **spec.args}
        return zoo.build(spec.model, **args).to(problem.device)

    def _part(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._cached:
            split = {"valid": self.problem.data.valid, "measured": self.split}[name]
            if split is None or split.labels is None:
                raise UserError(f"the {name} part of {self.problem.data.name} has no labels", "give a labelled split")
            x = torch.cat([self.problem.read(split, index) for index in torch.arange(len(split)).split(4096)])
            known = split.labels >= 0
            self._cached[name] = x[known.to(x.device)], split.labels[known].to(x.device)
        return self._cached[name]

    # ---- one set, one architecture ----

    def score(self, set: SyntheticSet, architecture: str | None = None, augment: Sequence[str] | None = None) -> Score:
        """Train `condense.seeds` fresh students on a set and measure them.

        Args:
            set: as it is stored.
            architecture: one of `architectures`; None for the inner network.
            augment: random changes while training; None for those of the recipe.
        """
        architecture = architecture or self.inner
        augment = list(self.condense.augment if augment is None else augment)
        content = {name: getattr(set, name) for name in ("images", "labels", "patterns", "compose", "logits", "view_logits", "targets")}
        key = [storage.tensors_fingerprint({k: v for k, v in content.items() if v is not None}), set.how, set.views, set.factor]
        made = lambda: lessons(set, self.condense.students.batch, augment, self.problem.seed)  # noqa: E731
        if set.targets is not None:
            return self._kept(
                [key, architecture, augment, "probe"], self.condense.students, self.rates, lambda: self._probed(set, architecture, made())
            )
        return self._scored([key, architecture, augment], architecture, made, self.condense.students, self.rates, set.how)

    def whole(self, architecture: str | None = None) -> Score:
        """The same for the whole real training set, with `condense.whole_training` in place of the students' length."""
        architecture = architecture or self.inner
        training, problem = self.whole_training, self.problem
        made = lambda: real_lessons(problem, training.batch, self.condense.augment, problem.seed)  # noqa: E731
        return self._scored(["whole", architecture, problem.data.fingerprint], architecture, made, training, self.rates, {})

    def _scored(
        self,
        key: Any,
        architecture: str,
        made: Callable[[], Lessons],
        training: Any,
        rates: Sequence[float],
        how: Mapping[str, Any],
    ) -> Score:
        return self._kept(key, training, rates, lambda: self._train_and_measure(architecture, made(), training, rates, how))

    def _train_and_measure(
        self, architecture: str, lessons: Lessons, training: Any, rates: Sequence[float], how: Mapping[str, Any]
    ) -> Score:
        count = self.condense.seeds
        networks = [network for rate in rates for network in self.students(architecture, count)]
        each = [rate for rate in rates for _ in range(count)]
        train_students(networks, lessons, training, each, dict(how))
        chosen = 0
        if len(rates) > 1:
            x, y = self._part("valid")
            chosen = _best([_accuracy(network, x, y) for network in networks], count)
        own = networks[chosen * count : (chosen + 1) * count]
        x, y = self._part("measured")
        logits = [said(network, x) for network in own]
        accuracies = [float((z.argmax(1) == y).double().mean()) for z in logits]
        metrics = self.task.metrics(logits[0], y) if bool(torch.isfinite(logits[0]).all()) else {}
        return Score(accuracies, rates[chosen], {k: v for k, v in metrics.items() if math.isfinite(v)})

    def _probed(self, set: SyntheticSet, architecture: str, lessons: Lessons) -> Score:
        """Pre-train on a set with targets, then a linear probe (logistic regression on the labelled training split)."""
        from limbeck.condensation.probe import probe

        assert set.targets is not None
        problem, count = self.problem, self.condense.seeds
        networks = self.students(architecture, count * len(self.rates), set.targets.shape[1])
        each = [rate for rate in self.rates for _ in range(count)]
        train_students(networks, lessons, self.condense.students, each, dict(set.how))
        classes = set.how.get("probe_classes", list(range(problem.classes)))
        train = (problem.labelled, problem.data.train.labels.cpu()[problem.labelled])
        measured = self._part("measured")
        valid = self._part("valid") if len(self.rates) > 1 else measured
        found = [probe(network, problem, train, (valid, measured), classes) for network in networks]
        chosen = _best([a for a, _ in found], count)
        return Score([b for _, b in found[chosen * count : (chosen + 1) * count]], self.rates[chosen])

    # ---- DD-Ranking ----

    def robust_scores(self, method: Condenser, own: SyntheticSet, random: SyntheticSet, whole: float) -> dict[str, float]:
        """Scores that cancel what soft labels and augmentation add, on the inner network; every accuracy is a fraction.

        Args:
            method: made `own`, and gives `random` the same kind of labels.
            own, random: the set, and random real samples with hard labels and the same budget.
            whole: accuracy of the whole real set with hard labels.

        Returns:
            hard_label_recovery (lower is better), improvement_over_random, label_robust_score, augmentation_robust_score, and the
            accuracies that they are made of.
        """
        same = random if not own.soft else method.soften(random, self.problem)
        if same is None:
            raise UserError(f"{method.card.id} made soft labels and cannot give them to other images", "its `soften` is missing")
        same = same.as_stored()
        augment = self.condense.augment or (["shift:1", "rotate:10"] if self.problem.images else [])
        any_, rand = self.score(own).mean, self.score(same).mean
        hard = self.score(own.hard()).mean if own.soft else any_
        found = {
            "hard_label_accuracy": hard,
            "random_accuracy_same_labels": rand,
            "hard_label_recovery": whole - hard,
            "improvement_over_random": any_ - rand,
            "label_robust_score": label_robust(any_, rand, hard, whole),
        }
        if augment:
            changed = [self.score(s, augment=augment).mean for s in (own, same)]
            plain = [self.score(s, augment=[]).mean for s in (own, same)]
            found["augmentation_robust_score"] = augmentation_robust(*changed, *plain)
        return found


def _best(accuracies: Sequence[float], count: int) -> int:
    """Which learning rate was best: accuracies stand rate after rate, `count` students each."""
    sums = [sum(accuracies[i : i + count]) for i in range(0, len(accuracies), count)]
    return max(range(len(sums)), key=sums.__getitem__)


def _accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((said(network, x).argmax(1) == y).double().mean())
