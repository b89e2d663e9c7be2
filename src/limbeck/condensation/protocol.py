"""The one fair way in which every set of this wing is judged (DC-BENCH, arXiv:2207.09639; DD-Ranking).

Fresh students, the same recipe and the same choice of learning rate for every set, several architectures, the last step and never the
best one; random real images get the same soft labels that a method gives its own. Sets are judged as they are stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import schema, storage, zoo
from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.students import Lessons, lessons, said, train_students
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.data.batches import own_randomness
from limbeck.errors import UserError
from limbeck.tasks import Classification


@dataclass
class Score:
    """What students of one architecture reached on one set.

    Attributes:
        accuracies: one for each student seed, on the split that is measured.
        lr: the learning rate that was used, chosen on the validation split where there was a choice.
        metrics: of the first student: accuracy, nll, ece ... (`limbeck.tasks`).
    """

    accuracies: list[float]
    lr: float
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean accuracy over the students."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def std(self) -> float:
        """Population standard deviation over the students, as the papers report it."""
        return math.sqrt(sum((a - self.mean) ** 2 for a in self.accuracies) / len(self.accuracies))


def label_robust(own: float, random: float, own_hard: float, real_hard: float, weight: float = 0.5) -> float:
    """DD-Ranking's label-robust score in [0, 1]; 0.2689 for a set that is worth what random real samples are and loses nothing.

    alpha = weight * (own - random) - (1 - weight) * (real_hard - own_hard); score = (e^alpha - e^-1) / (e - e^-1).

    Args:
        own, random: accuracy of the set and of random real samples with the same labels and recipe, as fractions.
        own_hard, real_hard: accuracy of the set under hard labels, and of the whole real set.
    """
    alpha = weight * (own - random) - (1 - weight) * (real_hard - own_hard)
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def augmentation_robust(own: float, random: float, own_plain: float, random_plain: float, weight: float = 0.5) -> float:
    """DD-Ranking's augmentation-robust score in [0, 1].

    beta = weight * (own - random) + (1 - weight) * (own_plain - random_plain); the same map as `label_robust`.

    Args:
        own, random: accuracies with augmentation; own_plain, random_plain: without.
    """
    beta = weight * (own - random) + (1 - weight) * (own_plain - random_plain)
    return (math.exp(beta) - math.exp(-1)) / (math.e - math.exp(-1))


class Protocol:
    """Scores sets on one problem; what has been scored is kept in `scores.json` of the run's folder.

    Args:
        problem: the real data.
        recipe: the recipe, for its `condense`, `evaluation` and `student` blocks.
        given: a module that stands for the inner network, if it was given as an object.

    Attributes:
        architectures: name -> maker of a fresh network; the first is the inner network.

    Raises:
        UserError: several learning rates without a validation split, or a split that is to be measured is missing.
    """

    def __init__(self, problem: Problem, recipe: schema.Recipe, given: nn.Module | None = None) -> None:
        self.problem, self.recipe, self.condense = problem, recipe, problem.condense
        data = problem.data
        self.rates = list(self.condense.lrs) or [self.condense.students.lr]
        if len(self.rates) > 1 and data.valid is None:
            raise UserError(
                "condense.lrs names several learning rates, and there is no validation split to choose on",
                "set data.valid, for example data.valid=0.2, or leave one rate",
            )
        if recipe.evaluation.final == "valid" and data.valid is None:
            raise UserError("evaluation.final is valid, and there is no validation split", "set data.valid, for example data.valid=0.2")
        self.split = data.test if recipe.evaluation.final == "test" else data.valid
        self.task = Classification(data.classes)
        specs = [recipe.student, *self.condense.networks]
        self.architectures: dict[str, Callable[[int | None], nn.Module]] = {}
        for number, spec in enumerate(specs):
            alone = sum(other.model == spec.model for other in specs) == 1
            name = spec.model if alone or number == 0 else _name(spec)
            self.architectures.setdefault(name, self._inner if number == 0 else self._maker(spec))
        self.inner = next(iter(self.architectures))
        folder = problem.session.folder
        self._file = None if folder is None else folder / "scores.json"
        self._known: dict[str, Any] = _read(self._file)
        self._cached: dict[str, tuple[Tensor, Tensor]] = {}

    def _inner(self, outputs: int | None) -> nn.Module:
        return self.problem.network(outputs=outputs)

    def _maker(self, spec: schema.Model) -> Callable[[int | None], nn.Module]:
        problem = self.problem

        def make(outputs: int | None) -> nn.Module:
            args = {"input_shape": problem.input_shape, "classes": outputs or problem.classes, **spec.args}
            return zoo.build(spec.model, **args).to(problem.device)

        return make

    def _part(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._cached:
            split = {"valid": self.problem.data.valid, "measured": self.split}[name]
            if split is None or split.labels is None:
                raise UserError(f"the {name} part of {self.problem.data.name} has no labels", "give a labelled split")
            x = torch.cat([self.problem.read(split, index) for index in torch.arange(len(split)).split(4096)])
            known = split.labels >= 0
            self._cached[name] = x[known.to(x.device)], split.labels[known].to(x.device)
        return self._cached[name]

    def students(self, architecture: str, count: int, outputs: int | None = None) -> list[nn.Module]:
        """Fresh networks; the k-th of them has the same first weights for every set.

        Args:
            outputs: width of the head; None for the classes.
        """
        made = []
        for number in range(count):
            with own_randomness(self.problem.seed, 77, number):
                made.append(self.architectures[architecture](outputs))
        return made

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
        base = self.condense.students.model_dump() | {"steps": None} | self.condense.whole_training
        training = schema.Training.model_validate(base)
        problem = self.problem

        def made() -> Lessons:
            labels = problem.data.train.labels.cpu()[problem.labelled].to(problem.device)
            take = lambda index: problem.at(problem.labelled[index.cpu()])  # noqa: E731
            return Lessons(take, labels, training.batch, self.condense.augment, seed=problem.seed)

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

    def _kept(self, key: Any, training: Any, rates: Sequence[float], measure: Callable[[], Score]) -> Score:
        """A score that is known, or measured now and kept."""
        problem = self.problem
        binding = [problem.data.fingerprint, problem.seed, self.condense.seeds, self.recipe.evaluation.final]
        digest = storage.fingerprint([key, training.model_dump(), rates, *binding])
        if digest not in self._known:
            with own_randomness(self.problem.seed, 78):
                self._known[digest] = asdict(measure())
            if self._file is not None:
                storage.write_json(self._file, self._known)
        return Score(**self._known[digest])

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
            found = [_accuracy(network, x, y) for network in networks]
            means = [sum(found[i * count : (i + 1) * count]) for i in range(len(rates))]
            chosen = max(range(len(rates)), key=means.__getitem__)
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
        means = [sum(a for a, _ in found[i * count : (i + 1) * count]) for i in range(len(self.rates))]
        chosen = max(range(len(self.rates)), key=means.__getitem__)
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


def _name(spec: schema.Model) -> str:
    inner = ",".join(f"{k}={v}" for k, v in spec.args.items())
    return f"{spec.model}({inner})" if inner else spec.model


def _read(file: Path | None) -> dict[str, Any]:
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError):
        raise UserError(f"{file} is torn", "delete it: the scores are then made again") from None
    return found


def _accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((said(network, x).argmax(1) == y).double().mean())
