"""How rotated keys and values get their start from data, and how many coordinates each head keeps for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.errors import UserError
from limbeck.signals.modes import evaluating
from limbeck.zoo.rotated_decoder import RotatedDecoder
from limbeck.zoo.rotation import Moments


def calibration(split: Any, count: int, batch: int, device: torch.device) -> list[Batch]:
    """The same few samples of a split every time, evenly spread over it, as batches."""
    index = torch.linspace(0, len(split) - 1, min(count, len(split))).round().long().unique()
    return [split.batch(part).to(device) for part in index.split(batch)]


@torch.no_grad()
def collect(model: RotatedDecoder, batches: Sequence[Batch]) -> list[Moments]:
    """Moments of keys (behind the rotary embedding) and values of every layer over the tokens of some batches; padding is not counted."""
    rotations = model.rotations()
    found = [Moments(r.heads, r.width, r.free.device) for r in rotations]
    try:
        for rotation, moments in zip(rotations, found):
            rotation.moments = moments
        with evaluating(model):
            for batch in batches:
                mask = batch.inputs.get("attention_mask")
                for moments in found:
                    moments.keep = None if mask is None else mask.bool()
                model(**batch.inputs, use_cache=False)
    finally:
        for rotation in rotations:
            rotation.moments = None
    return found


def start_from_data(model: RotatedDecoder, batches: Sequence[Batch], centred: bool = True) -> None:
    """Principal directions of keys and values as the rotations, and their means."""
    for rotation, moments in zip(model.rotations(), collect(model, batches)):
        means, bases, _ = moments.principal(centred)
        rotation.start(means.to(rotation.free), bases.to(rotation.free))


def start_at_random(model: RotatedDecoder) -> None:
    """Random orthogonal matrices, no means; draws from torch's global generator."""
    for rotation in model.rotations():
        bases = torch.linalg.qr(torch.randn(rotation.free.shape)).Q.to(rotation.free)
        rotation.start(torch.zeros_like(bases[..., 0]), bases)


def random_ranks(layers: int, heads: int, width: int, steps: int) -> Tensor:
    """`(layers, 2, H)` drawn apart from each other, uniformly from {d/steps, 2 d/steps, ..., d} (whole numbers, at least 1)."""
    choices = torch.tensor([max(1, round(width * n / steps)) for n in range(1, steps + 1)])
    return choices[torch.randint(steps, (layers, 2, heads))]


def _neighbours(ranks: Tensor, step: int, floor: int) -> Iterator[tuple[int, Tensor]]:
    """(place in the flat ranks, ranks with that one entry lowered) for each entry that is above the floor."""
    for place, rank in enumerate(ranks.flatten().tolist()):
        if rank > floor:
            lower = ranks.flatten().clone()
            lower[place] = max(floor, rank - step)
            yield place, lower.view_as(ranks)


@torch.no_grad()
def search_ranks(
    hidden: Callable[[Tensor], Tensor],
    start: Tensor,
    mean_rank: float,
    step: int,
    floor: int,
    share: float,
) -> Tensor:
    """Greedy ranks for a budget (MatryoshkaKV, arXiv 2410.14731).

    Each round tries every entry one step lower and measures ||h' - h|| / ||h|| against the hidden states h at the present ranks; the
    entries with the least errors are lowered at once, in the last round only as many as the budget still needs.

    Args:
        hidden: hidden states of a calibration text at given ranks.
        start: `(layers, 2, H)` ranks to begin with; it is not changed.
        mean_rank: lower until the mean is at most this.
        step: how far an entry is lowered at a time.
        floor: the least rank.
        share: of all entries that are lowered in one round (1536 of 2048 in the released code).

    Returns:
        Ranks of the same shape, none above `start`.

    Raises:
        UserError: a mean below the floor, which no ranks can have.
    """
    if mean_rank < floor:
        raise UserError(f"a mean rank of {mean_rank:g} with no rank below {floor}", "raise the budget, or lower the floor")
    ranks = start.clone()
    at_once = max(1, math.floor(share * ranks.numel()))
    while ranks.double().mean() > mean_rank:
        h = hidden(ranks)
        errors = {place: (hidden(lower) - h).norm() / h.norm() for place, lower in _neighbours(ranks, step, floor)}
        order = sorted(errors, key=lambda place: (float(errors[place]), place))
        flat = ranks.view(-1)
        for place in order[:at_once]:
            if flat.double().mean() <= mean_rank:
                break
            flat[place] = max(floor, int(flat[place]) - step)
    return ranks
