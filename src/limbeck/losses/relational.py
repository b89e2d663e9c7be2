"""What the samples of a batch (or the classes) are to each other, student against teacher; widths may differ.

Shapes: features `(B, ...)`, flattened to `(B, D)`; logits `(B, C)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses._rows import check_same, tempered, unit, wide

_TINY = 1e-12


def _flat(features: Tensor) -> Tensor:
    return wide(features).flatten(1)


def _check_batch(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise UserError(
            f"the student's batch has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: not the same number of samples",
            "give both the same samples in the same order",
        )


def _distances(x: Tensor) -> Tensor:
    """`(B, B)` Euclidean distances over the mean of those that are not zero."""
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d / (d.sum() / (d > 0).sum().clamp(min=1)).clamp(min=_TINY)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_ij huber(d_s(i, j) - d_t(i, j)), d = |x_i - x_j| / mean of the non-zero distances.

    Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068).

    >>> rkd_distance(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [10.0], [30.0]]))  # scale does not count
    tensor(0.)
    """
    _check_batch(student, teacher)
    return F.smooth_l1_loss(_distances(_flat(student)), _distances(_flat(teacher)))


def _angles(x: Tensor) -> Tensor:
    """`(B, B, B)` cosines at sample i between the directions from j and from k."""
    directions = unit(x.unsqueeze(0) - x.unsqueeze(1))
    return directions @ directions.mT


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_ijk huber(cos_s(j, i, k) - cos_t(j, i, k)), the cosines of all triangles; memory grows with B^2 (B + D).

    Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068).

    >>> rkd_angle(torch.eye(3), 5 * torch.eye(3) + 1)  # turning, scaling and shifting do not count
    tensor(0.)
    """
    _check_batch(student, teacher)
    return F.smooth_l1_loss(_angles(_flat(student)), _angles(_flat(teacher)))


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """|G_s - G_t|_F^2 / B^2, G = F F^T with rows scaled to length 1. Tung & Mori (arXiv 1907.09682).

    >>> similarity_preserving(torch.eye(2), torch.ones(2, 7))  # rows (1, 0) against (0.7, 0.7)
    tensor(0.2929)
    """
    _check_batch(student, teacher)
    s, t = _flat(student), _flat(teacher)
    return F.mse_loss(unit(s @ s.mT), unit(t @ t.mT))


def channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """sum |N_s - N_t|^2 / (B C), N = rows of f f^T scaled to length 1, f `(C, positions)` of each sample: which channels fire together.

    Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation" (arXiv 2202.03680), with rows scaled
    as in DisWOT (arXiv 2303.15678). Both sides have C channels; positions may differ.

    Args:
        student: `(B, C, ...)`.
        teacher: `(B, C, ...)`.

    >>> channel_correlation(torch.eye(2)[None], torch.ones(1, 2, 7))  # rows (1, 0) against (0.7, 0.7)
    tensor(0.5858)
    """
    _check_batch(student, teacher)
    if student.ndim < 3 or teacher.ndim < 3 or student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"channel correlations of features {tuple(student.shape)} and {tuple(teacher.shape)}",
            "both need (B, C, positions ...) with one number of channels; bring them there by a bridge",
        )
    s, t = wide(student).flatten(2), wide(teacher).flatten(2)
    gap = unit(s @ s.mT) - unit(t @ t.mT)
    return gap.square().sum() / (len(s) * s.shape[1])


def pearson(x: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    """Pearson's correlation along `dim`; 0 where a side is constant.

    >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 3.0, 1.0]))
    tensor(-1.0000)
    """
    check_same(x, y, "values")
    return (_centred(wide(x), dim) * _centred(wide(y), dim)).sum(dim)


def _centred(x: Tensor, dim: int) -> Tensor:
    """Centred and of length 1; what is left of equal numbers by rounding is taken for nothing."""
    return unit(x - x.mean(dim, keepdim=True), dim, 4 * torch.finfo(x.dtype).eps * x.detach().norm(dim=dim, keepdim=True) + 1e-12)


def correlation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, inter: float = 1.0, intra: float = 1.0
) -> Tensor:
    """T^2 * (inter * mean_b (1 - pearson over classes) + intra * mean_c (1 - pearson over the batch)) of softmax(logits / T).

    The student may differ from the teacher by scale and shift of its probabilities. With one class (or one sample) the inter-class (or
    intra-class) part is zero. Huang et al., DIST, "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536).

    >>> correlation(torch.eye(2), torch.eye(2).flip(0))  # the worst: 2 and 2
    tensor(4.)
    """
    check_same(student_logits, teacher_logits)
    s = F.softmax(tempered(student_logits, temperature), -1)
    t = F.softmax(tempered(teacher_logits, temperature), -1)
    total = s.sum() * 0.0
    if s.shape[-1] > 1 and inter:
        total = total + inter * (1 - pearson(s, t, dim=-1)).mean()
    if s.shape[0] > 1 and intra:
        total = total + intra * (1 - pearson(s, t, dim=0)).mean()
    return total * (temperature * temperature)


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), columns centred: 1 is the same up to rotation and scale.

    A similarity, not a loss: use 1 - cka. Kornblith et al. (arXiv 1905.00414). The smaller of Gram and covariance matrices is formed.

    >>> cka(torch.eye(4), 3 * torch.eye(4).flip(1)).round(decimals=4)
    tensor(1.)
    """
    _check_batch(x, y)
    x, y = _flat(x), _flat(y)
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) <= min(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.mT, y @ y.mT
        cross, own_x, own_y = (gram_x * gram_y).sum(), gram_x.norm(), gram_y.norm()
    else:
        cross, own_x, own_y = (y.mT @ x).square().sum(), (x.mT @ x).norm(), (y.mT @ y).norm()
    return cross / (own_x * own_y).clamp(min=_TINY)


def self_relation(
    student: Tensor, teacher: Tensor, *, heads: int, mask: Tensor | None = None, kind: str = "mse", reduction: str = "mean"
) -> Tensor:
    """How tokens relate to each other, student against teacher; widths may differ: R = X X^T / sqrt(a), X `(B, heads, L, a)`.

    mse: mean over all entries of (R_s - R_t)^2. kl: KL(softmax(R_t) || softmax(R_s)) over keys, a mean over heads and tokens.
    The D channels are split again into `heads` heads of a = floor(D / heads), and what is left over is dropped. Of queries, keys or values
    of one layer: Wang et al., MiniLMv2 (arXiv 2012.15828); AutoDistil (arXiv 2201.12507), whose code has mse.

    Args:
        student: `(B, L, D_s)`.
        teacher: `(B, L, D_t)`.
        heads: relation heads; at most D of each side.
        mask: `(B, L)` true on tokens. kl hides padded keys and leaves out padded tokens; in mse, as in AutoDistil's code, the same number
            would be added on both sides, so it changes nothing.
        kind: "mse" or "kl".
        reduction: "mean", or "none" for one value a sample `(B,)`.

    >>> self_relation(torch.eye(2)[None], 2 * torch.eye(2)[None], heads=1)  # diagonals 1 and 4, over sqrt 2
    tensor(2.2500)
    """
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            f"relations of tokens of shape {tuple(student.shape)} and {tuple(teacher.shape)}", "give both (B, L, D) of the same texts"
        )
    if not 1 <= heads <= min(student.shape[-1], teacher.shape[-1]):
        raise UserError(
            f"{heads} relation heads of widths {student.shape[-1]} and {teacher.shape[-1]}", "use 1 to the smaller of the two widths"
        )
    if kind not in ("mse", "kl"):
        raise UserError(f"unknown kind of relation {kind!r}", "use 'mse' or 'kl'")
    s, t = _relations(student, heads), _relations(teacher, heads)
    if kind == "mse":
        rows = (s - t).square().flatten(1).mean(1)
        return rows if reduction == "none" else rows.mean()
    if mask is not None:
        hidden = ~mask.bool()[:, None, None, :]
        s, t = s.masked_fill(hidden, -1e4), t.masked_fill(hidden, -1e4)
    each = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean(1)
    seen = torch.ones_like(each) if mask is None else mask.to(each)
    rows = (each * seen).sum(1)
    return rows / seen.sum(1).clamp_min(1) if reduction == "none" else rows.sum() / seen.sum().clamp_min(1)


def _relations(x: Tensor, heads: int) -> Tensor:
    """`(B, L, D)` to `(B, heads, L, L)`."""
    width = x.shape[-1] // heads
    split = wide(x)[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
    return split @ split.mT / width**0.5
