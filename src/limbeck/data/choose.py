"""Which samples go where: stratified draws and hidden labels, each a pure function of labels and a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.data.batch import UNLABELLED
from limbeck.errors import UserError


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded from several numbers at once, so that neighbouring seeds share nothing."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (int(number) & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def amount(asked: int | float, total: int, what: str) -> int:
    """A count of samples from a count (int) or a share of `total` (float between 0 and 1).

    Raises:
        UserError: more than there is, or not a positive number.
    """
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or asked <= 0 or (isinstance(asked, float) and asked >= 1):
        raise UserError(f"{what} is {asked!r}", "give a positive count of samples, or a share between 0 and 1 such as 0.2")
    count = asked if isinstance(asked, int) else max(1, round(asked * total))
    if count > total:
        raise UserError(f"{what} asks for {count} samples, but there are only {total}", f"ask for at most {total}")
    return count


def stratified(labels: Tensor | None, total: int, count: int, seed: int) -> Tensor:
    """`count` positions out of `total`, sorted, with every class in its share as nearly as whole numbers allow.

    Without labels, and with labels for several classes at once `(N, C)`, the draw is uniform.
    """
    source = generator(seed, total)
    order = torch.randperm(total, generator=source)
    if labels is None or labels.ndim != 1:
        return order[:count].sort().values
    classes, numbers = labels.unique(return_inverse=True)
    sizes = torch.bincount(numbers, minlength=len(classes))
    exact = sizes.double() * count / max(total, 1)
    quota = exact.floor().long()
    # Whole numbers left over go to the classes with the largest remainders; ties to the smaller class number.
    left = count - int(quota.sum())
    quota[torch.argsort(exact - quota, descending=True, stable=True)[:left]] += 1
    shuffled = numbers[order]
    picked = [order[(shuffled == c).nonzero()[:, 0][: int(quota[c])]] for c in range(len(classes))]
    return torch.cat(picked).sort().values


def hide(labels: Tensor, keep: int, seed: int) -> Tensor:
    """A copy of `labels` `(N,)` in which `keep` labels stay, as many in each class as possible, and the rest are `UNLABELLED`.

    Raises:
        UserError: fewer labels than classes, or labels that are not one class a sample.
    """
    if labels.ndim != 1:
        raise UserError("labelled needs one class a sample", "leave labelled out for multi-label data")
    classes, sizes = labels[labels != UNLABELLED].unique(return_counts=True)
    if keep > int(sizes.sum()):
        raise UserError(f"labelled={keep}, but only {int(sizes.sum())} training samples have a label", "ask for fewer")
    if keep < len(classes):
        least = len(classes)
        raise UserError(f"labelled={keep} would leave some of the {least} classes without a label", f"ask for at least {least}")
    quota = torch.zeros_like(sizes)
    left = keep
    while left:
        room = (quota < sizes).nonzero()[:, 0][:left]
        quota[room] += 1
        left -= len(room)
    order = torch.randperm(len(labels), generator=generator(seed, len(labels), 7))
    hidden = torch.full_like(labels, UNLABELLED)
    for value, number in zip(classes, quota.tolist()):
        chosen = order[labels[order] == value][:number]
        hidden[chosen] = value
    return hidden


def mislabel(labels: Tensor | None, share: float, classes: list[int] | None, total: int, seed: int) -> Tensor:
    """Labels of which some are wrong on purpose, for studies of label noise.

    Args:
        labels: `(N,)` true class numbers.
        share: of the samples of `classes`, drawn one by one, that get a label drawn evenly from `classes` (which may be the true one).
        classes: where labels are noisy; None for all.
        total: the number of classes there are.
        seed: of the draw.

    Raises:
        UserError: no single label a sample, a share outside [0, 1], or a class that does not exist.
    """
    if labels is None or labels.ndim != 1:
        raise UserError("label noise needs one label a sample", "leave label_noise out")
    chosen = list(range(total)) if classes is None else list(classes)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise UserError(f"the share of label_noise is {share!r}", "give a number between 0 and 1")
    if not chosen or any(not isinstance(c, int) or not 0 <= c < total for c in chosen):
        raise UserError(f"label_noise names classes {chosen}", f"give class numbers from 0 to {total - 1}")
    source = generator(seed, len(labels), 0x40153)
    among = torch.tensor(chosen)
    hit = torch.isin(labels, among) & (torch.rand(len(labels), generator=source) < share)
    drawn = among[torch.randint(len(among), (len(labels),), generator=source)]
    return torch.where(hit, drawn, labels)
