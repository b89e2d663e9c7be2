"""A budget: the most that a model may cost, in any of the figures that `limbeck.evaluation.cost` measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.errors import UserError, unknown

MEASURED = {
    "params": "params",
    "flops": "flops",
    "bytes": "bytes",
    "latency_ms": "latency_ms",
    "memory": "peak_memory",
    "bits": "bits",
}
"""What may be limited, and its name among the figures of `limbeck.evaluation.cost.Cost`; `bits` is 8 * bytes / params."""

UNITS = {
    "params": "parameters",
    "flops": "FLOPs",
    "bytes": "bytes",
    "latency_ms": "ms",
    "memory": "bytes of memory",
    "bits": "bits a weight",
}


def figure_of(cost: Mapping[str, Any], name: str) -> float:
    """One figure of a measured cost by its name in a budget.

    Raises:
        UserError: no such figure.
    """
    if name not in MEASURED:
        raise unknown("limit of a budget", name, MEASURED)
    if name == "bits":
        return 8 * cost["bytes"] / cost["params"] if cost["params"] else math.inf
    return float(cost[MEASURED[name]])


@dataclass(frozen=True)
class Budget:
    """Upper limits of a model's cost.

    Attributes:
        limits: by name of `MEASURED`, in absolute figures.
    """

    limits: Mapping[str, float]

    @classmethod
    def of(cls, spec: Mapping[str, float | str], reference: Mapping[str, Any]) -> Budget:
        """A budget as a recipe writes it.

        Args:
            spec: `{name: number}`, or a share of the reference's figure written "40%".
            reference: the cost of the model that shares are taken of (the teacher), as `Cost.as_dict` gives it.

        Raises:
            UserError: an unknown name, or a limit that is no positive number.
        """
        limits = {}
        for name, value in spec.items():
            whole = figure_of(reference, name)
            share = isinstance(value, str) and value.strip().endswith("%")
            try:
                number = float(value.strip().removesuffix("%")) if isinstance(value, str) else float(value)
            except ValueError:
                number = math.nan
            if not 0 < number < math.inf:
                raise UserError(f"budget.{name} is {value!r}", 'give a positive number, or a share of the teacher such as "40%"')
            limits[name] = whole * number / 100 if share else number
        return cls(limits)

    def excess(self, cost: Mapping[str, Any]) -> dict[str, float]:
        """What a model uses of each limit: 1 is all of it, more is too much."""
        return {name: figure_of(cost, name) / limit for name, limit in self.limits.items()}

    def met(self, cost: Mapping[str, Any]) -> bool:
        """Whether a model is within every limit."""
        return all(used <= 1 for used in self.excess(cost).values())

    def tightest(self, cost: Mapping[str, Any]) -> tuple[str, float]:
        """The limit of which most is used, and how much of it.

        Raises:
            UserError: the budget limits nothing.
        """
        used = self.excess(cost)
        if not used:
            raise UserError("the budget limits nothing", "set structure.budget, for example structure.budget.params=40%")
        name = max(used, key=used.__getitem__)
        return name, used[name]

    def describe(self) -> str:
        """`at most 4000 parameters and 2.5 ms`."""
        return "at most " + " and ".join(f"{limit:.6g} {UNITS[name]}" for name, limit in self.limits.items())

    def refuse(self, smallest: Mapping[str, Any], how: str) -> UserError:
        """The error for a budget that cannot be met.

        Args:
            smallest: the cost of the smallest model that can be reached.
            how: what makes it, for the message ("pruning with floor 0.1").
        """
        over = [name for name, used in self.excess(smallest).items() if used > 1]
        told = " and ".join(f"{figure_of(smallest, name):.6g} {UNITS[name]} (asked: {self.limits[name]:.6g})" for name in over)
        return UserError(
            f"the budget cannot be met by {how}: the smallest reachable model has {told}",
            "raise structure.budget, or choose another method",
        )
