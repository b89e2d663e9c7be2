"""What every set is judged with: scores, and what the protocols of samples and of graphs share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import schema, storage
from limbeck.data.batches import own_randomness
from limbeck.errors import MISFITS, UserError


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
    return _unit(weight * (own - random) - (1 - weight) * (real_hard - own_hard))


def augmentation_robust(own: float, random: float, own_plain: float, random_plain: float, weight: float = 0.5) -> float:
    """DD-Ranking's augmentation-robust score in [0, 1].

    beta = weight * (own - random) + (1 - weight) * (own_plain - random_plain); the same map as `label_robust`.

    Args:
        own, random: accuracies with augmentation; own_plain, random_plain: without.
    """
    return _unit(weight * (own - random) + (1 - weight) * (own_plain - random_plain))


def _unit(value: float) -> float:
    """(e^value - e^-1) / (e - e^-1): from [-1, 1] to [0, 1]."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


class BaseProtocol:
    """Scores sets on one problem; what has been scored is kept in `scores.json` of the run's folder.

    Args:
        problem: the real data (`Problem` or `GraphProblem`).
        recipe: the recipe, for its `condense`, `evaluation` and `student` blocks.

    Attributes:
        architectures: names of the networks; the first, `inner`, is the recipe's student.
        rates: learning rates among which each set's is chosen.
        split: what is measured on.

    Raises:
        UserError: several learning rates without a validation split, or a split that is to be measured is missing.
    """

    def __init__(self, problem: Any, recipe: schema.Recipe) -> None:
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
        specs = [recipe.student, *self.condense.networks]
        self._specs: dict[str, schema.Model] = {}
        for number, spec in enumerate(specs):
            alone = sum(other.model == spec.model for other in specs) == 1
            self._specs.setdefault(spec.model if alone or number == 0 else _name(spec), spec)
        self.architectures = tuple(self._specs)
        self.inner = self.architectures[0]
        folder = problem.session.folder
        self._file = None if folder is None else folder / "scores.json"
        self._known: dict[str, Any] = _read(self._file)

    @property
    def whole_training(self) -> schema.Training:
        """How students of the whole real set are trained: as all others, but for `condense.whole_training`."""
        return schema.Training.model_validate(self.condense.students.model_dump() | {"steps": None} | self.condense.whole_training)

    def make(self, spec: schema.Model, outputs: int | None) -> nn.Module:
        """A fresh network from torch's global generator; `outputs` is the width of its head (None: the classes)."""
        raise NotImplementedError

    def score(self, set: Any, architecture: str | None = None, augment: Sequence[str] | None = None) -> Score:
        """What fresh students reach on a set."""
        raise NotImplementedError

    def whole(self, architecture: str | None = None) -> Score:
        """What fresh students reach on the whole real training set."""
        raise NotImplementedError

    def students(self, architecture: str, count: int, outputs: int | None = None) -> list[nn.Module]:
        """Fresh networks; the k-th of them has the same first weights for every set.

        Args:
            outputs: width of the head; None for the classes.
        """
        made = []
        for number in range(count):
            with own_randomness(self.problem.seed, 77, number):
                made.append(self.make(self._specs[architecture], outputs))
        return made

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


def _name(spec: schema.Model) -> str:
    inner = ",".join(f"{k}={v}" for k, v in spec.args.items())
    return f"{spec.model}({inner})" if inner else spec.model


def _read(file: Path | None) -> dict[str, Any]:
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, *MISFITS):
        raise UserError(f"{file} is torn", "delete it: the scores are then made again") from None
    return found
