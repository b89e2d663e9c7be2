"""Evolutionary search over the arguments of a network, with a front of quality over cost; the optimiser is optuna's NSGA-II."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.errors import UserError
from limbeck.evaluation.budget import Budget
from limbeck.evaluation.front import front

Genes = dict[str, Any]
"""A candidate: one value for each argument of the space."""


@dataclass(frozen=True)
class Candidate:
    """A network that was looked at.

    Attributes:
        genes: its arguments.
        score: larger is better.
        cost: as `limbeck.evaluation.cost` gives it.
        within: whether it keeps the budget.
    """

    genes: Genes
    score: float
    cost: Mapping[str, Any]
    within: bool


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: the highest score within the budget.
        front: what no other candidate within the budget beats in score and parameters, smallest first.
        seen: how many candidates were scored.
    """

    best: Candidate
    front: list[Candidate]
    seen: int


def size_of(space: Mapping[str, Sequence[Any]]) -> int:
    """How many candidates a space holds."""
    return math.prod(len(values) for values in space.values())


def check_space(space: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a space that names nothing to choose.

    Raises:
        UserError: it is empty, or an argument has no values.
    """
    if not space:
        raise UserError("the search space is empty", "give space, for example {depth: [1, 2, 3], width: [4, 8, 16]}")
    for name, values in space.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"space.{name} is {values!r}", "give a list of the values to choose from")


def search(
    space: Mapping[str, Sequence[Any]],
    look: Callable[[Genes], tuple[float, Mapping[str, Any]] | None],
    budget: Budget | None,
    *,
    trials: int = 200,
    population: int = 20,
    seed: int = 0,
    tick: Callable[[int], None] = lambda done: None,
) -> Found:
    """Search a space; a small one is looked at whole.

    Args:
        space: argument -> values.
        look: scores a candidate and measures its cost; None for one that cannot be built.
        budget: what the winner must keep.
        trials: candidates that are proposed at most.
        population: of the evolution.
        seed: of its draws.
        tick: told how many candidates were proposed.

    Raises:
        UserError: nothing can be built, or nothing keeps the budget (naming the nearest), or optuna is missing.
    """
    check_space(space)
    seen: dict[str, Candidate | None] = {}

    def candidate(genes: Genes) -> Candidate | None:
        key = json.dumps(genes, sort_keys=True)
        if key not in seen:
            told = look(genes)
            seen[key] = None if told is None else Candidate(genes, told[0], told[1], budget is None or budget.met(told[1]))
        return seen[key]

    if size_of(space) <= trials:
        for number, values in enumerate(itertools.product(*space.values()), 1):
            candidate(dict(zip(space, values)))
            tick(number)
    else:
        _evolve(space, candidate, budget, trials, population, seed, tick)
    made = [one for one in seen.values() if one is not None]
    if not made:
        raise UserError("no network of the search space can be built for this data", "look at the values of space")
    within = [one for one in made if one.within]
    if not within:
        assert budget is not None
        nearest = min(made, key=lambda one: max(budget.excess(one.cost).values()))
        raise budget.refuse(nearest.cost, f"any of the {len(made)} networks that were looked at")
    places = front([(one.score, one.cost["params"]) for one in within], (True, False))
    order = sorted((within[place] for place in places), key=lambda one: one.cost["params"])
    return Found(max(within, key=lambda one: one.score), order, len(made))


def _evolve(
    space: Mapping[str, Sequence[Any]],
    candidate: Callable[[Genes], Candidate | None],
    budget: Budget | None,
    trials: int,
    population: int,
    seed: int,
    tick: Callable[[int], None],
) -> None:
    """NSGA-II (Deb et al. 2002) over score and parameters, with the budget as a constraint."""
    try:
        import optuna
    except ImportError:
        raise UserError("a search of this size needs optuna, which is not installed", "`pip install 'limbeck[search]'`") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    # categories are positions, because optuna wants plain values and a space may hold lists
    def objective(trial: Any) -> tuple[float, float]:
        genes = {name: values[trial.suggest_categorical(name, range(len(values)))] for name, values in space.items()}
        made = candidate(genes)
        tick(trial.number + 1)
        if made is None:
            raise optuna.TrialPruned
        if budget is not None:
            for name, used in budget.excess(made.cost).items():
                trial.set_constraint(name, used - 1)
        return made.score, float(made.cost["params"])

    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(objective, n_trials=trials)
