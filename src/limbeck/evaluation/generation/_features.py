"""Feature matrices: what they must be, and Euclidean distances between their rows, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.errors import UserError


def matrices(least: int, **sides: Tensor) -> dict[str, Tensor]:
    """The feature matrices in float64 on the CPU, once all are `(N, D)` with one D, N at least `least`, and finite."""
    for name, side in sides.items():
        if side.ndim != 2 or not side.shape[1]:
            raise UserError(f"{name} features of shape {tuple(side.shape)}", "give one row of features a sample, (N, D)")
        check_enough(name, side, least)
    widths = {name: side.shape[1] for name, side in sides.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{width} ({name})" for name, width in widths.items())
        raise UserError(f"samples differ in their number of features: {listed}", "take all of them from the same feature network")
    for name, side in sides.items():
        if bad := int((~side.isfinite()).sum()):
            raise UserError(f"{bad} values of the {name} features are not finite", "look at those samples: did the generator diverge?")
    return {name: side.detach().cpu().double() for name, side in sides.items()}


def check_enough(name: str, side: Tensor, least: int) -> None:
    """Refuse fewer than `least` samples."""
    if len(side) < least:
        hint = "take more samples" + (", or a smaller k" if least > 2 else "")
        raise UserError(f"{len(side)} {name} samples where at least {least} are needed", hint)


def check_k(k: int) -> None:
    """Refuse a neighbour below the first."""
    if k < 1:
        raise UserError(f"neighbour k = {k}", "take k = 1 or more; 5 is usual")


def block(x: Tensor) -> int:
    """How many rows of a matrix with a column for each sample of `x` fit in 64 MiB."""
    return max(1, 2**23 // len(x))


def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances, some rows `(n, len(b))` at a time; exactly 0 for equal samples, which products of matrices would not give."""
    for part in a.split(block(b)):
        yield torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(x: Tensor, among: Tensor) -> Tensor:
    """`(len(x),)` distance of each sample to the nearest one of `among`."""
    return torch.cat([d.amin(1) for d in distances(x, among)])
