"""Which of several models nobody else beats in every respect."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]], larger: Sequence[bool]) -> list[int]:
    """The Pareto front: the points that no other one matches in all respects and beats in one.

    Args:
        points: `(N, D)` figures.
        larger: for each of the D figures whether larger is better.

    Returns:
        Their positions, in order; of equal points all.

    >>> front([(0.9, 100), (0.8, 50), (0.7, 60)], [True, False])
    [0, 1]
    """
    signed = [tuple(value if up else -value for value, up in zip(point, larger)) for point in points]

    def beaten(own: tuple[float, ...]) -> bool:
        return any(other != own and all(a >= b for a, b in zip(other, own)) for other in signed)

    return [number for number, own in enumerate(signed) if not beaten(own)]
