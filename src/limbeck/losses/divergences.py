"""How far the student's distribution over classes is from the teacher's.

Shapes: logits `(..., C)`; the last axis holds the classes and all axes before it are rows. `mask` and `weight` are `(...)`.
Logits are finite: a class that cannot be gets a very low number (-1e4), not -inf, whose 0 * inf is NaN.
In the equations t = softmax(teacher / T_t), s = softmax(student / T); sums run over classes and the mean over scored rows.

The factor T^2 of Hinton et al. (arXiv 1503.02531), which keeps gradients comparable when the temperature changes, is applied
here and nowhere else: it is the square of the *student's* temperature, and `scale_temperature=False` turns it off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError, unknown
from limbeck.losses._rows import Reduction, blank, check_rows, check_same, reduce_rows, tempered


def _logs(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """log s and log t, hidden rows blanked."""
    check_same(student_logits, teacher_logits)
    if teacher_temperature is None:
        teacher_temperature = temperature
    student = tempered(blank(student_logits, mask), temperature)
    teacher = tempered(blank(teacher_logits, mask), teacher_temperature)
    return F.log_softmax(student, -1), F.log_softmax(teacher, -1)


def _finish(
    rows: Tensor, temperature: float | Tensor, scale: bool, mask: Tensor | None, weight: Tensor | None, reduction: Reduction
) -> Tensor:
    if scale and (isinstance(temperature, Tensor) or temperature != 1):
        rows = rows * (temperature * temperature)
    return reduce_rows(rows, mask, weight, reduction)


def _kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) a row; differentiable in both."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(t || s) * T^2 = T^2 * sum_c t_c (log t_c - log s_c): the student covers everything the teacher finds likely.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).

    Args:
        student_logits: `(..., C)`.
        teacher_logits: `(..., C)`.
        temperature: T, a number, a scalar tensor, or a tensor `(...)` with one entry a row.
        teacher_temperature: T_t, the same as T unless given.
        scale_temperature: multiply by T^2.
        mask: `(...)` true where a row is scored.
        weight: `(...)` a factor a row.
        reduction: "mean" over scored rows, "sum", or "none".

    >>> forward_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]]))  # ln 2
    tensor(0.6931)
    """
    if mask is None and weight is None and reduction == "mean" and not isinstance(temperature, Tensor):
        check_same(student_logits, teacher_logits)
        log_s = F.log_softmax(tempered(student_logits, temperature), -1)
        log_t = F.log_softmax(tempered(teacher_logits, temperature if teacher_temperature is None else teacher_temperature), -1)
        total = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        rows = log_s.numel() // max(log_s.shape[-1], 1)
        return total * ((temperature * temperature if scale_temperature else 1.0) / max(rows, 1))
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, teacher_temperature, mask)
    return _finish(_kl_rows(log_t, log_s), temperature, scale_temperature, mask, weight, reduction)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(s || t) * T^2 = T^2 * sum_c s_c (log s_c - log t_c): the student avoids what the teacher finds unlikely.

    Gu et al., "MiniLLM" (arXiv 2306.08543). Arguments as in `forward_kl`.

    >>> reverse_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.4338)
    """
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, teacher_temperature, mask)
    return _finish(_kl_rows(log_s, log_t), temperature, scale_temperature, mask, weight, reduction)


def jeffreys(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """(KL(t || s) + KL(s || t)) * T^2 = T^2 * sum_c (t_c - s_c)(log t_c - log s_c): symmetric.

    Jeffreys, "An invariant form for the prior probability" (1946). Arguments as in `forward_kl`.

    >>> jeffreys(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.7616)
    """
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, teacher_temperature, mask)
    rows = ((log_t.exp() - log_s.exp()) * (log_t - log_s)).sum(-1)
    return _finish(rows, temperature, scale_temperature, mask, weight, reduction)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Generalised Jensen-Shannon: T^2 * (beta KL(t || m) + (1 - beta) KL(s || m)), m = beta t + (1 - beta) s.

    Bounded by ln 2. Divided by beta it tends to KL(t || s) as beta -> 0, divided by 1 - beta to KL(s || t) as beta -> 1; at the
    ends themselves it is zero, so `beta` must lie strictly between. Agarwal et al., GKD (arXiv 2306.13649). Other
    arguments as in `forward_kl`.

    >>> jensen_shannon(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))  # disjoint: ln 2
    tensor(0.6931)
    """
    if not 0 < beta < 1:
        raise UserError(f"beta of the Jensen-Shannon divergence is {beta}", "use 0 < beta < 1, or forward_kl / reverse_kl for the limits")
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, teacher_temperature, mask)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    rows = beta * _kl_rows(log_t, log_m) + (1 - beta) * _kl_rows(log_s, log_m)
    return _finish(rows, temperature, scale_temperature, mask, weight, reduction)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    reverse: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 * KL(t || skew t + (1 - skew) s); with `reverse`, T^2 * KL(s || (1 - skew) t + skew s). Bounded by -ln skew.

    skew = 0 is forward (or reverse) KL. Ko et al., DistiLLM (arXiv 2402.03898). Other arguments as in `forward_kl`.

    >>> skew_kl(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]), skew=0.5)  # disjoint: ln 2
    tensor(0.6931)
    """
    if not 0 <= skew < 1:
        raise UserError(f"the skew is {skew}", "use 0 <= skew < 1")
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, teacher_temperature, mask)
    own, other = (log_s, log_t) if reverse else (log_t, log_s)
    mixture = torch.logaddexp(own + math.log(skew), other + math.log1p(-skew)) if skew else other
    return _finish(_kl_rows(own, mixture), temperature, scale_temperature, mask, weight, reduction)


def alpha_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 * (1 - sum_c t_c^alpha s_c^(1 - alpha)) / (alpha (1 - alpha)): from reverse KL (alpha 0) to forward KL (alpha 1).

    Within 1e-4 of the ends the KL itself is returned. alpha = 0.5 is four times the squared Hellinger distance. Outside [0, 1]
    it grows without bound where one side has almost no mass. Amari (1985). Other arguments as in `forward_kl`.

    >>> alpha_divergence(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]), alpha=0.5)  # disjoint: 1 / (a (1 - a))
    tensor(4.)
    """
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, teacher_temperature, mask)
    if abs(alpha - 1) < 1e-4:
        rows = _kl_rows(log_t, log_s)
    elif abs(alpha) < 1e-4:
        rows = _kl_rows(log_s, log_t)
    else:
        # alpha t + (1 - alpha) s sums to 1; taken class by class it keeps equal distributions at exactly zero.
        gap = alpha * log_t.exp() + (1 - alpha) * log_s.exp() - (alpha * log_t + (1 - alpha) * log_s).exp()
        rows = gap.sum(-1) / (alpha * (1 - alpha))
    return _finish(rows, temperature, scale_temperature, mask, weight, reduction)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """1/2 sum_c |t_c - s_c|, between 0 and 1; never scaled by the temperature. Wen et al., f-distill (arXiv 2307.15190).

    Arguments as in `forward_kl`.

    >>> total_variation(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor(0.5000)
    """
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, teacher_temperature, mask)
    return reduce_rows(0.5 * (log_t.exp() - log_s.exp()).abs().sum(-1), mask, weight, reduction)


_DIRECTIONS = {"forward": forward_kl, "reverse": reverse_kl, "jeffreys": jeffreys, "js": jensen_shannon}


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    direction: str = "forward",
    teacher_temperature: float | Tensor | None = None,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The divergence named by `direction`: "forward", "reverse", "jeffreys" or "js" (beta 0.5). Arguments as in `forward_kl`.

    >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0, direction="reverse")
    tensor(0.4805)
    """
    divergence = _DIRECTIONS.get(direction)
    if divergence is None:
        raise unknown("direction", direction, _DIRECTIONS)
    return divergence(
        student_logits,
        teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        scale_temperature=scale_temperature,
        mask=mask,
        weight=weight,
        reduction=reduction,
    )


_PARTS = ("forward", "reverse")


def split_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    top: int,
    head: str = "reverse",
    tail: str = "forward",
    temperature: float | Tensor = 1.0,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 * (sum over the teacher's `top` likeliest classes of d_head + sum over the others of d_tail): two divergences share the classes.

    forward: d = t log(t / s) - t + s; reverse: d = s log(s / t) - s + t. Both are never negative; over all classes -t + s cancels, so
    head = tail gives the KL of that direction. From the abstract of "Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative
    Models" (TopKLD); which direction serves which part is not told there. Other arguments as in `forward_kl`.

    Args:
        top: K, how many classes the head has; C or more is all of them, 0 none.
        head, tail: "forward" or "reverse".

    >>> split_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]]), top=2, head="forward")  # ln 2
    tensor(0.6931)
    """
    for side in (head, tail):
        if side not in _PARTS:
            raise unknown("direction", side, _PARTS)
    if top < 0:
        raise UserError(f"the head has {top} classes", "use 0 or more")
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, None, mask)
    s, t = log_s.exp(), log_t.exp()
    gap = log_t - log_s
    each = {"forward": t * gap - t + s, "reverse": t - s - s * gap}
    chosen = log_t.topk(min(top, log_t.shape[-1]), -1).indices
    inside = torch.zeros_like(log_t, dtype=torch.bool).scatter_(-1, chosen, True)
    rows = torch.where(inside, each[head], each[tail]).sum(-1)
    return _finish(rows, temperature, scale_temperature, mask, weight, reduction)


def bernoulli_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 * mean_c [q log(q / p) + (1 - q) log((1 - q) / (1 - p))], q = sigmoid(teacher / T), p = sigmoid(student / T).

    For labels that do not exclude each other; the mean over classes matches `binary_cross_entropy`. Arguments as in `forward_kl`.

    >>> bernoulli_kl(torch.tensor([[0.0]]), torch.tensor([[50.0]]))  # ln 2
    tensor(0.6931)
    """
    check_same(student_logits, teacher_logits)
    student = tempered(blank(student_logits, mask), temperature)
    teacher = tempered(blank(teacher_logits, mask), temperature)
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return _finish((yes + no).mean(-1), temperature, scale_temperature, mask, weight, reduction)


def entropy(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-sum_c p_c log p_c with p = softmax(logits / T), in nats; between 0 and ln C. Arguments as in `forward_kl`.

    >>> entropy(torch.zeros(3, 4))  # ln 4
    tensor(1.3863)
    """
    log_p = F.log_softmax(tempered(blank(logits, mask), temperature), -1)
    return reduce_rows(-(log_p.exp() * log_p).sum(-1), mask, weight, reduction)


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    scale_temperature: bool = True,
    ignore: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T^2 * (alpha TCKD + beta NCKD): the teacher's doubt about the label, and its view of the other classes, weighed apart.

    TCKD = KL over {label, rest}; NCKD = KL over the other classes, renormalised without the label. alpha = 1 with
    beta = 1 - t_label gives back `forward_kl`. Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679).

    Args:
        student_logits: `(..., C)`.
        teacher_logits: `(..., C)`.
        labels: `(...)` class numbers; rows with the label `ignore` are not scored.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature, scale_temperature, weight, reduction: as in `forward_kl`.

    >>> decoupled_kd(torch.zeros(1, 3), torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0]), alpha=0.0, temperature=1.0)
    tensor(0.)
    """
    check_rows(student_logits.shape[:-1], labels, "label")
    mask = labels != ignore
    log_s, log_t = _logs(student_logits, teacher_logits, temperature, None, mask)
    label = labels.clamp(min=0).unsqueeze(-1)
    lowest = torch.finfo(log_s.dtype).min / 4  # finite on purpose: -inf - -inf would be NaN when there is one class only

    def split(log_p: Tensor) -> tuple[Tensor, Tensor]:
        rest = log_p.scatter(-1, label, lowest)
        mass = rest.logsumexp(-1, keepdim=True)
        return torch.cat([log_p.gather(-1, label), mass], -1), F.log_softmax(rest, -1)

    (target_s, others_s), (target_t, others_t) = split(log_s), split(log_t)
    rows = alpha * _kl_rows(target_t, target_s) + beta * _kl_rows(others_t, others_s)
    return _finish(rows, temperature, scale_temperature, mask, weight, reduction)
