"""How far a student's answers are its teacher's answers."""

from __future__ import annotations

import torch
from torch import Tensor


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """Agreement of two classifiers over the same samples.

    Args:
        student_logits: `(N, C)`.
        teacher_logits: `(N, C)`.

    Returns:
        `top1`: fraction of samples with the same first class; `kl`: mean KL(teacher || student) in nats;
        `js`: mean Jensen-Shannon divergence in nats (between 0 and ln 2).
    """
    if not len(student_logits):
        return {"top1": 0.0, "kl": 0.0, "js": 0.0}
    log_s = student_logits.double().log_softmax(-1)
    log_t = teacher_logits.double().log_softmax(-1)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, dtype=torch.float64, device=log_s.device))

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean()

    return {
        "top1": float((student_logits.argmax(-1) == teacher_logits.argmax(-1)).double().mean()),
        "kl": float(kl(log_t, log_s)),
        "js": float((kl(log_t, log_m) + kl(log_s, log_m)) / 2),
    }


def disagreements(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, limit: int | None = 24) -> Tensor:
    """Indices of the samples where student and teacher name different classes, the most confident disagreement first.

    The confidence of a disagreement is the product of the two top probabilities. Samples with a label are set before those
    without one (label -1) at equal confidence.

    Args:
        student_logits: `(N, C)`.
        teacher_logits: `(N, C)`.
        labels: `(N,)` or None.
        limit: at most so many; None for all.

    Returns:
        `(M,)` int64 indices, M <= limit.
    """
    p_student, c_student = student_logits.float().softmax(-1).max(-1)
    p_teacher, c_teacher = teacher_logits.float().softmax(-1).max(-1)
    where = (c_student != c_teacher).nonzero().flatten()
    confidence = (p_student * p_teacher)[where]
    if labels is not None and labels.ndim == 1:
        where_labelled = (labels[where] >= 0).to(confidence.device)
        by_label = torch.argsort(where_labelled, descending=True, stable=True)
        where, confidence = where[by_label], confidence[by_label]
    return where[torch.argsort(confidence, descending=True, stable=True)][:limit]
