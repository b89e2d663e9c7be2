"""Distances between features of student and teacher that already have one shape (a bridge brings them there).

Shapes: features `(B, ...)` of any kind unless said; the mean runs over everything that is scored. `mask` and `weight` are `(...)`,
one entry for each vector of the last axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses._rows import Reduction, blank, check_rows, check_same, reduce_rows, unit, wide

_TINY = 1e-12


def mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """mean (s - t)^2, over the last axis and then over rows. Romero et al., FitNets (arXiv 1412.6550).

    Args:
        student: `(..., D)`.
        teacher: `(..., D)`.
        mask: `(...)` true where a row is scored.
        weight: `(...)` a factor a row.
        reduction: "mean" over scored rows, "sum" of the rows' means, or "none".

    >>> mse(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]]))
    tensor(2.)
    """
    check_same(student, teacher, "features")
    student, teacher = wide(student), wide(teacher)
    if mask is None and weight is None and reduction == "mean" and student.numel():
        return F.mse_loss(student, teacher)
    rows = (blank(student, mask) - blank(teacher, mask)).square().mean(-1)
    return reduce_rows(rows, mask, weight, reduction)


def l1(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """mean |s - t|, over the last axis and then over rows. Kim et al., factor transfer (arXiv 1802.04977). Arguments as in `mse`.

    >>> l1(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]]))
    tensor(1.)
    """
    check_same(student, teacher, "features")
    rows = (blank(wide(student), mask) - blank(wide(teacher), mask)).abs().mean(-1)
    return reduce_rows(rows, mask, weight, reduction)


def cosine_distance(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """1 - <s, t> / (|s| |t|), between 0 and 2. Sanh et al., DistilBERT (arXiv 1910.01108). Arguments as in `mse`.

    >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(1.)
    """
    check_same(student, teacher, "features")
    unit_s = unit(blank(wide(student), mask))
    unit_t = unit(blank(wide(teacher), mask))
    return reduce_rows(1 - (unit_s * unit_t).sum(-1), mask, weight, reduction)


def normalized_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """|s / |s| - t / |t||^2 = 2 * cosine distance (summed over D). Grill et al., BYOL (arXiv 2006.07733). Arguments as in `mse`.

    >>> normalized_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(2.)
    """
    check_same(student, teacher, "features")
    unit_s = unit(blank(wide(student), mask))
    unit_t = unit(blank(wide(teacher), mask))
    return reduce_rows((unit_s - unit_t).square().sum(-1), mask, weight, reduction)


def normalized_l1(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """|s / |s| - t / |t||_1 (summed over D), the distance of directions to the first power (PPCL, 2025). Arguments as in `mse`.

    >>> normalized_l1(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(2.)
    """
    check_same(student, teacher, "features")
    unit_s = unit(blank(wide(student), mask))
    unit_t = unit(blank(wide(teacher), mask))
    return reduce_rows((unit_s - unit_t).abs().sum(-1), mask, weight, reduction)


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """`(B, positions)` mean over channels of |F|^power, scaled to length 1: where a network looks.

    Channels are axis 1 of `(B, C, H, W)`, and the last axis of tokens `(B, L, D)`.

    >>> attention_map(torch.ones(1, 3, 2, 2))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if features.ndim < 3:
        raise UserError(f"features of shape {tuple(features.shape)} have no positions", "attention maps need (B, C, H, W) or (B, L, D)")
    channels = -1 if features.ndim == 3 else 1
    return unit(wide(features).abs().pow(power).mean(channels).flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0, weight: Tensor | None = None) -> Tensor:
    """mean over samples and positions of (Q_s - Q_t)^2, Q = `attention_map`; channels may differ.

    Zagoruyko & Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928; the mean of squares, as their code has it).

    Args:
        student: `(B, C_s, H, W)` or `(B, L, D_s)`.
        teacher: `(B, C_t, H, W)` or `(B, L, D_t)`, the same positions.
        power: of the absolute activation.
        weight: `(B,)` a factor a sample.

    >>> attention_transfer(torch.ones(1, 3, 2, 2), torch.ones(1, 8, 2, 2))
    tensor(0.)
    """
    map_s, map_t = attention_map(student, power), attention_map(teacher, power)
    check_same(map_s, map_t, "attention maps")
    return reduce_rows((map_s - map_t).square().mean(-1), None, weight)


def norm_and_direction(
    student_embedding: Tensor,
    class_directions: Tensor,
    teacher_norm: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """1 - <s, e> / max(|s|, |t|): grow along the teacher's class mean until the teacher's norm, then only turn.

    The max is taken for each sample and not detached. Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and
    Direction" (arXiv 2305.17007).

    Args:
        student_embedding: `(B, D)` s.
        class_directions: `(B, D)` e, the unit class mean of each sample's label.
        teacher_norm: `(B,)` |t|.
        mask, weight, reduction: as in `mse`.

    >>> norm_and_direction(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([4.0]))
    tensor(0.7500)
    """
    check_same(student_embedding, class_directions, "embeddings and class directions")
    check_rows(student_embedding.shape[:-1], teacher_norm, "teacher norm")
    student = blank(wide(student_embedding), mask)
    length = torch.maximum(student.norm(dim=-1), wide(teacher_norm)).clamp(min=_TINY)
    rows = 1 - (student * blank(wide(class_directions), mask)).sum(-1) / length
    return reduce_rows(rows, mask, weight, reduction)
