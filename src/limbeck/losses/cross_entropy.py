"""Learning from targets: class numbers, probabilities, several labels at once.

Shapes: logits `(..., C)`; the last axis holds the classes and all axes before it are rows. The mean runs over scored rows; rows whose
label is hidden are not scored, and when none is scored the loss is zero, still in the graph.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses._rows import Reduction, blank, check_positive, check_rows, check_same, reduce_rows, tempered, wide


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore: int | None = -1,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-sum_c y_c log softmax(logits)_c, y one-hot, or (1 - a) one-hot + a / C with label smoothing a.

    Args:
        logits: `(..., C)`.
        labels: `(...)` int64 class numbers; rows with the label `ignore` are not scored.
        ignore: the label that hides a row; None when no row is hidden, which saves looking for them.
        label_smoothing: a, between 0 and 1 (Szegedy et al., arXiv 1512.00567).
        weight: `(...)` a factor a row.
        reduction: "mean" over scored rows, "sum", or "none".

    >>> cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, -1]))  # ln 2
    tensor(0.6931)
    """
    check_rows(logits.shape[:-1], labels, "label")
    flat, target = wide(logits), labels
    if logits.ndim != 2:
        flat, target = flat.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if ignore is None:
        if weight is None and reduction != "none":
            return F.cross_entropy(flat, target, label_smoothing=label_smoothing, reduction=reduction)
        ignore = -1
    if weight is None and reduction != "none":
        total = F.cross_entropy(flat, target, ignore_index=ignore, label_smoothing=label_smoothing, reduction="sum")
        if reduction == "sum":
            return total
        if reduction == "mean":
            return total / (target != ignore).sum().clamp(min=1)
    rows = F.cross_entropy(flat, target, ignore_index=ignore, label_smoothing=label_smoothing, reduction="none")
    return reduce_rows(rows.view(labels.shape), labels != ignore, weight, reduction)


def soft_cross_entropy(
    logits: Tensor,
    target_probabilities: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-sum_c q_c log softmax(logits / T)_c; the targets q need not sum to one. No factor T^2.

    Args:
        logits: `(..., C)`.
        target_probabilities: `(..., C)` q.
        temperature: T, as in `forward_kl`.
        mask: `(...)` true where a row is scored.
        weight: `(...)` a factor a row.
        reduction: "mean" over scored rows, "sum", or "none".

    >>> soft_cross_entropy(torch.zeros(2, 4), torch.full((2, 4), 0.25))  # ln 4
    tensor(1.3863)
    """
    check_same(logits, target_probabilities, "logits and target probabilities")
    log_s = F.log_softmax(tempered(blank(logits, mask), temperature), -1)
    rows = -(wide(blank(target_probabilities, mask)) * log_s).sum(-1)
    return reduce_rows(rows, mask, weight, reduction)


def binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore: int = -1,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """mean_c [-y_c log p_c - (1 - y_c) log(1 - p_c)], p = sigmoid(logits): several labels at once.

    Args:
        logits: `(..., C)`.
        labels: `(..., C)` 0, 1, or a probability between; a row that holds `ignore` is not scored.
        ignore: the value that hides a row.
        label_smoothing: a; targets become (1 - a) y + a / 2.
        weight: `(...)` a factor a row.
        reduction: "mean" over scored rows, "sum" over rows, or "none".

    >>> binary_cross_entropy(torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]))  # ln 2
    tensor(0.6931)
    """
    check_same(logits, labels, "logits and labels")
    mask = (labels != ignore).all(-1)
    logits = wide(logits)
    target = labels.to(logits.dtype).masked_fill(~mask.unsqueeze(-1), 0)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / 2
    rows = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    return reduce_rows(rows, mask, weight, reduction)


def target_enhanced_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    eps: float = 1.0,
    temperature: float | Tensor = 1.0,
    variant: Literal["code", "paper"] = "code",
    ignore: int = -1,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-sum_c w_c log s_c: soft cross-entropy that leans to the label where the teacher is unsure.

    variant "code" (as released): w = (t + y)^eps - y; "paper": w_label = (1 + t_label)^eps, w_c = t_c elsewhere. "code" with eps = 1
    is the ordinary soft cross-entropy; "paper" with eps = 1 adds the hard cross-entropy to it. No factor T^2; w does not sum to one.
    Hao et al., "One-for-All" (arXiv 2310.19444).

    Args:
        student_logits: `(..., C)`.
        teacher_logits: `(..., C)`.
        labels: `(...)` class numbers, or `(..., C)` mixed labels, of which the largest counts. A row with the label `ignore` gets y = 0:
            the teacher still teaches, nothing is enhanced.
        eps: the power, 1 or more.
        temperature, mask, weight, reduction: as in `forward_kl`.

    >>> target_enhanced_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), eps=2.0)  # (5/4 + 1/4) ln 2
    tensor(1.0397)
    """
    check_same(student_logits, teacher_logits)
    check_positive(eps, "power eps")
    if labels.ndim == student_logits.ndim:
        hidden = (labels == ignore).any(-1)
        labels = labels.argmax(-1).masked_fill(hidden, ignore)
    check_rows(student_logits.shape[:-1], labels, "label")
    log_s = F.log_softmax(tempered(blank(student_logits, mask), temperature), -1)
    t = F.softmax(tempered(blank(teacher_logits, mask), temperature), -1)
    known = (labels != ignore).to(t.dtype).unsqueeze(-1)
    y = torch.zeros_like(t).scatter(-1, labels.masked_fill(labels == ignore, 0).unsqueeze(-1), known)
    if variant == "code":
        w = (t + y) ** eps - y
    elif variant == "paper":
        w = torch.where(y > 0, (1 + t) ** eps, t)
    else:
        raise UserError(f"unknown variant {variant!r}", "use 'code' (as released) or 'paper'")
    return reduce_rows(-(w * log_s).sum(-1), mask, weight, reduction)
