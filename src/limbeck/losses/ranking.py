"""The student reproduces a ranking of the classes.

Plackett-Luce: classes are picked one after the other, each among those left, with probability proportional to exp(score). The stable form
puts the best class last and runs a log-cumsum-exp along the classes; it is computed in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses._rows import Reduction, check_rows, check_same, reduce_rows, tempered, wide


def _steps(ranked: Tensor) -> Tensor:
    """`(..., K)` logsumexp_{l >= k} s_l - s_k for scores ordered best first; the last is zero."""
    ranked = ranked - ranked.detach().amax(-1, keepdim=True)
    return ranked.flip(-1).logcumsumexp(-1).flip(-1) - ranked


def plackett_luce(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    topk: int | None = None,
    alpha: Tensor | None = None,
    ignore: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """sum_k alpha_k [logsumexp_{l >= k} s_{pi_l} - s_{pi_k}]: the label first, then the others as the teacher ranks them.

    pi_1 = label, pi_2.. = the other classes by falling teacher logit (ties: lower class number first);
    alpha_k = softmax(teacher / T)_{pi_k}. The temperature only softens the weights: the student is not divided by it, there is no T^2.
    "PLD: A Choice-Theoretic List-Wise Knowledge Distillation" (arXiv 2506.12542).

    Args:
        student_logits: `(..., C)`.
        teacher_logits: `(..., C)`.
        labels: `(...)` class numbers; rows with the label `ignore` are not scored.
        temperature: T of the weights.
        topk: rank only the teacher's `topk` best classes and the label; the weights keep their values (ties at the cut are arbitrary).
        alpha: `(K,)` or `(..., K)` weights by rank instead of the teacher's: (1, 0, ...) is cross-entropy, all 1 is ListMLE.
        ignore: the label that hides a row.
        weight: `(...)` a factor a row.
        reduction: "mean" over scored rows, "sum", or "none".

    >>> plackett_luce(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))  # 1/2 ln 2
    tensor(0.3466)
    """
    check_same(student_logits, teacher_logits)
    check_rows(student_logits.shape[:-1], labels, "label")
    classes = student_logits.shape[-1]
    scored = labels != ignore
    label = labels.masked_fill(~scored, 0).unsqueeze(-1)
    student, teacher = wide(student_logits), wide(teacher_logits)
    key = teacher.detach().scatter(-1, label, torch.inf)
    cut = topk is not None and topk + 1 <= classes
    if cut:
        if topk < 1:
            raise UserError(f"topk is {topk}", "use 1 or more, or none for all classes")
        order = key.topk(topk + 1, dim=-1).indices
    else:
        order = key.argsort(dim=-1, descending=True, stable=True)
    ranked = student.gather(-1, order)
    weights = F.softmax(tempered(teacher, temperature), -1).gather(-1, order) if alpha is None else alpha.to(student.dtype)
    if cut:
        # When the label is itself among the topk, the last of the topk + 1 columns is one too many: it gets no mass and no weight.
        inside = (teacher > teacher.gather(-1, label)).sum(-1, keepdim=True) < topk
        extra = inside & (torch.arange(order.shape[-1], device=order.device) == topk)
        ranked = ranked.masked_fill(extra, torch.finfo(ranked.dtype).min / 4)
        weights = weights.masked_fill(extra, 0)
    return reduce_rows((weights * _steps(ranked)).sum(-1), scored, weight, reduction)


def list_mle(
    scores: Tensor,
    relevance: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """sum_k [logsumexp_{l >= k} s_{pi_l} - s_{pi_k}], pi = classes by falling relevance: -log probability of that ranking.

    Xia et al., "Listwise approach to learning to rank" (ICML 2008).

    Args:
        scores: `(..., K)` what is trained.
        relevance: `(..., K)` what orders it, such as a teacher's scores; only the order counts, ties keep their position.
        mask: `(...)` true where a row is scored.
        weight: `(...)` a factor a row.
        reduction: "mean" over scored rows, "sum", or "none".

    >>> list_mle(torch.zeros(1, 3), torch.tensor([[3.0, 1.0, 2.0]]))  # ln 3!
    tensor(1.7918)
    """
    check_same(scores, relevance, "scores and relevances")
    order = relevance.argsort(dim=-1, descending=True, stable=True)
    return reduce_rows(_steps(wide(scores).gather(-1, order)).sum(-1), mask, weight, reduction)
