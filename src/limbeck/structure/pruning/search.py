"""The smallest cut that meets a budget, found on real, smaller networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from limbeck.evaluation.budget import Budget


def smallest_ratio(
    cut: Callable[[float], nn.Module], cost: Callable[[nn.Module], Mapping[str, Any]], budget: Budget, how: str, halvings: int = 10
) -> float:
    """The smallest ratio in [0, 1] whose network is within the budget, by bisection on the measured cost.

    Args:
        cut: the network at a ratio; its cost must not grow with the ratio.
        cost: measures a network.
        budget: what it may cost.
        how: for the message of a budget that cannot be met.
        halvings: of the interval; 10 finds the ratio to 0.001.

    Raises:
        UserError: not even ratio 1 meets the budget; tells what it costs.
    """
    if budget.met(cost(cut(0.0))):
        return 0.0
    smallest = cost(cut(1.0))
    if not budget.met(smallest):
        raise budget.refuse(smallest, how)
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        if budget.met(cost(cut(middle))):
            high = middle
        else:
            low = middle
    return high
