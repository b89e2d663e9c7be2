"""How a loss falls with a model's size: the power law of scaling curves, fitted to measured points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.errors import UserError


@dataclass(frozen=True)
class Scaling:
    """loss = factor * size^(-exponent) + floor.

    Attributes:
        factor: c > 0.
        exponent: g > 0.
        floor: L0 >= 0, what no size gets below.
        error: root of the mean squared distance from the measured losses.
    """

    factor: float
    exponent: float
    floor: float
    error: float

    def at(self, size: float) -> float:
        """The loss of a model of that size."""
        return self.factor * size**-self.exponent + self.floor

    def size_for(self, loss: float) -> float:
        """The size at which the loss is reached; infinity at the floor and below."""
        if loss <= self.floor or self.factor <= 0:
            return math.inf
        return (self.factor / (loss - self.floor)) ** (1 / self.exponent)


def fit_scaling(sizes: Sequence[float], losses: Sequence[float], steepest: float = 5.0) -> Scaling:
    """Least squares of loss = c * size^(-g) + L0 with c, L0 >= 0.

    For each g the best c and L0 are a problem of non-negative least squares; g itself is searched between 0.001 and `steepest`, on a grid
    first, because the error has several valleys where points are few. Sizes may be bits of a model (bit-level scaling laws) or parameters.

    Args:
        sizes: three or more, positive and not all equal.
        losses: as many, finite.
        steepest: the largest exponent that is tried.

    Raises:
        UserError: too few points, or values that are not positive and finite.

    >>> found = fit_scaling([1e4, 1e5, 1e6, 1e7], [2 * n**-0.3 + 0.5 for n in (1e4, 1e5, 1e6, 1e7)])
    >>> round(found.exponent, 3), round(found.floor, 3)
    (0.3, 0.5)
    """
    import numpy as np
    from scipy.optimize import minimize_scalar, nnls

    if len(sizes) != len(losses) or len(set(sizes)) < 3:
        raise UserError(
            f"a power law through {len(set(sizes))} sizes and {len(losses)} losses", "give three sizes or more, a loss for each"
        )
    if not all(0 < n < math.inf for n in sizes) or not all(math.isfinite(x) for x in losses):
        raise UserError("sizes must be positive and losses finite", "leave out the runs that failed")
    middle = math.exp(sum(math.log(n) for n in sizes) / len(sizes))
    x, y = np.asarray(sizes, dtype=float) / middle, np.asarray(losses, dtype=float)

    def solve(log_g: float) -> tuple[np.ndarray, float]:
        return nnls(np.stack([x ** -math.exp(log_g), np.ones_like(x)], 1), y)

    grid = np.linspace(math.log(1e-3), math.log(steepest), 80)
    best = int(np.argmin([solve(g)[1] for g in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(lambda g: solve(g)[1], bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    (c, floor), norm = solve(found.x)
    exponent = math.exp(found.x)
    return Scaling(float(c) * middle**exponent, exponent, float(floor), float(norm) / math.sqrt(len(y)))
