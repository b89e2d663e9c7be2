"""Value and gradient of each divergence on one block of logits.

A kernel takes tempered logits of student and teacher, both `(n, V)`, which it may destroy, and returns the value of each row `(n,)`.
With `slope` the student's block holds d(value)/d(logits) afterwards. In the equations t and s are the two laws, z their logits.
With g = d(value)/d(log s) the gradient in the logits is g - s sum(g).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.vocabulary.law import LOWEST


def dot(a: Tensor, b: Tensor) -> Tensor:
    """`(n, 1)` inner products of rows."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)


def shifted(z: Tensor) -> Tensor:
    """z minus its largest entry, in place."""
    return z.sub_(z.amax(1, keepdim=True))


def logs(z: Tensor) -> tuple[Tensor, Tensor]:
    """(p, log p): log p in place, p beside it."""
    p = shifted(z).exp()
    total = p.sum(1, keepdim=True)
    z.sub_(total.log())
    return p.div_(total), z


def log_(p: Tensor) -> Tensor:
    """log p in place; what underflowed counts as the smallest number, so that 0 log 0 is 0."""
    return p.clamp_(min=torch.finfo(p.dtype).tiny).log_()


def settle(z: Tensor, g: Tensor, s: Tensor) -> None:
    """z = g - s sum(g); g may be z."""
    torch.addcmul(g, s, g.sum(1, keepdim=True), value=-1, out=z)


def forward(z: Tensor, u: Tensor, slope: bool) -> Tensor:
    """KL(t || s) = sum t (log t - log s); gradient s - t."""
    shifted(z)
    t = shifted(u).exp()
    total_t = t.sum(1, keepdim=True)
    inside = dot(t, u.sub_(z)).div_(total_t)
    z.exp_()
    total_s = z.sum(1, keepdim=True)
    if slope:
        z.mul_(1 / total_s).addcmul_(t, -1 / total_t)
    return (inside + total_s.log() - total_t.log()).squeeze(1)


def reverse(z: Tensor, u: Tensor, slope: bool) -> Tensor:
    """KL(s || t) = sum s r with r = log s - log t; gradient s (r - sum s r)."""
    s = shifted(z).exp()
    total_s = s.sum(1, keepdim=True)
    z.sub_(shifted(u))
    total_t = u.exp_().sum(1, keepdim=True)
    inside = dot(s, z).div_(total_s)
    if slope:
        z.sub_(inside).mul_(s).mul_(1 / total_s)
    return (inside + total_t.log() - total_s.log()).squeeze(1)


def js(z: Tensor, u: Tensor, slope: bool, beta: float = 0.5) -> Tensor:
    """b KL(t || m) + (1 - b) KL(s || m), m = b t + (1 - b) s; gradient (1 - b) s (log s - log m - KL(s || m))."""
    if beta == 0 or beta == 1:
        return (reverse if beta else forward)(z, u, slope)
    s, log_s = logs(z)
    t, log_t = logs(u)
    log_m = log_(torch.lerp(s, t, beta))
    value = dot(t, log_t.sub_(log_m)).mul_(beta)
    own = dot(s, log_s.sub_(log_m))
    if slope:
        z.sub_(own).mul_(s).mul_(1 - beta)
    return value.add_(own, alpha=1 - beta).squeeze(1)


def skew(z: Tensor, u: Tensor, slope: bool, skew: float = 0.1) -> Tensor:
    """KL(t || m), m = a t + (1 - a) s; g = -t (1 - a) s / m."""
    if skew == 0:
        return forward(z, u, slope)
    s, _ = logs(z)
    t, log_t = logs(u)
    m = torch.lerp(s, t, skew).clamp_(min=torch.finfo(s.dtype).tiny)
    share = s.div(m).mul_(t).mul_(skew - 1) if slope else None
    value = dot(t, log_t.sub_(m.log_()))
    if share is not None:
        settle(z, share, s)
    return value.squeeze(1)


def skew_reverse(z: Tensor, u: Tensor, slope: bool, skew: float = 0.1) -> Tensor:
    """KL(s || m), m = (1 - a) t + a s; g = s (log s - log m + 1 - a s / m)."""
    if skew == 0:
        return reverse(z, u, slope)
    s, log_s = logs(z)
    t, _ = logs(u)
    m = torch.lerp(t, s, skew).clamp_(min=torch.finfo(s.dtype).tiny)
    share = s.div(m) if slope else None
    gap = log_s.sub_(m.log_())
    value = dot(s, gap)
    if share is not None:
        settle(z, gap.add_(share, alpha=-skew).add_(1).mul_(s), s)
    return value.squeeze(1)


def alpha(z: Tensor, u: Tensor, slope: bool, alpha: float = 0.5) -> Tensor:
    """(1 - sum t^a s^(1 - a)) / (a (1 - a)); g = (s - t^a s^(1 - a)) / a. Within 1e-4 of 1 and 0: forward and reverse KL."""
    if abs(alpha - 1) < 1e-4:
        return forward(z, u, slope)
    if abs(alpha) < 1e-4:
        return reverse(z, u, slope)
    s, log_s = logs(z)
    t, log_t = logs(u)
    mixed = log_t.mul_(alpha).add_(log_s, alpha=1 - alpha).exp_()
    value = t.lerp_(s, 1 - alpha).sub_(mixed).sum(1).div_(alpha * (1 - alpha))
    if slope:
        settle(z, torch.sub(s, mixed, out=mixed).div_(alpha), s)
    return value


def alpha_beta(z: Tensor, u: Tensor, slope: bool, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """-1/(a b) sum [t^a s^b - a/(a + b) t^(a + b) - b/(a + b) s^(a + b)], its limits where a or b is 0; g = (s^(a + b) - t^a s^b) / a."""
    s, log_s = logs(z)
    _, log_t = logs(u)
    both = alpha + beta
    if alpha == 0:
        s_b, t_b = (log_s * beta).exp_(), (log_t * beta).exp_()
        gap = log_s.sub_(log_t).mul_(s_b)
        value = (gap.sum(1) * beta - s_b.sub_(t_b).sum(1)) / beta**2
        if slope:
            settle(z, gap, s)
        return value
    t_all, s_all = (log_t * both).exp_(), (log_s * both).exp_()
    if beta == 0:
        value = (dot(t_all, log_t.sub_(log_s)).squeeze(1) * alpha - (t_all - s_all).sum(1)) / alpha**2
        mixed = t_all
    else:
        mixed = log_t.mul_(alpha).add_(log_s, alpha=beta).exp_()
        value = t_all.lerp_(s_all, beta / both).sub_(mixed).sum(1) / (alpha * beta)
    if slope:
        settle(z, s_all.sub_(mixed).div_(alpha), s)
    return value


def total_variation(z: Tensor, u: Tensor, slope: bool) -> Tensor:
    """1/2 sum |s - t|; g = 1/2 sign(s - t) s."""
    s = torch.softmax(z, 1)
    gap = torch.softmax(u, 1, out=u).neg_().add_(s)
    if slope:
        settle(z, torch.sign(gap, out=z).mul_(s).mul_(0.5), s)
    return gap.abs_().sum(1).mul_(0.5)


def adaptive(z: Tensor, u: Tensor, slope: bool, head: float = 0.5) -> Tensor:
    """(h KL(t || s) + r KL(s || t)) / (h + r); h and r are sum |t - s| over the teacher's head and the rest, without gradient.

    The head is the fewest likeliest tokens that hold at least the mass `head`; some released code leaves the token that crosses it to the
    rest. Equal laws: both weights one half.
    """
    s, log_s = logs(z)
    t, log_t = logs(u)
    ordered, order = t.sort(dim=1, descending=True, stable=True)
    inside = (ordered.cumsum(1).sub_(ordered) < head).to(t.dtype)
    gap = (s - t).abs_()
    all_gaps = gap.sum(1, keepdim=True)
    head_gaps = dot(gap.gather(1, order), inside)
    share = torch.where(all_gaps > 0, head_gaps / all_gaps.clamp(min=torch.finfo(t.dtype).tiny), 0.5).clamp_(0, 1)
    r = log_s.sub_(log_t)
    forth, back = -dot(t, r), dot(s, r)
    if slope:
        z.sub_(back).mul_(s).mul_(1 - share).addcmul_(s.sub_(t), share)
    return (share * forth + (1 - share) * back).squeeze(1)


def interpolated(z: Tensor, u: Tensor, slope: bool, progress: float | Tensor = 0.5) -> Tensor:
    """-sum p log s with p = softmax((1 - x) z_s + x z_t) without gradient; gradient s - p."""
    if isinstance(progress, Tensor):
        u.sub_(z).mul_(progress.to(u.dtype)).add_(z)
    else:
        u.lerp_(z, 1 - progress)
    p = torch.softmax(u, 1, out=u)
    s, log_s = logs(z)
    value = -dot(p, log_s)
    if slope:
        torch.sub(s, p, out=z)
    return value.squeeze(1)


def decoupled(z: Tensor, u: Tensor, slope: bool, target: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """a KL over {target, rest} + b KL over the rest alone.

    With o the log-odds of the target: d/do of the first is s_y - t_y, and o falls with the other logits by their share of the rest.
    """
    target = target.unsqueeze(1)
    odds_s, rest_s, log_s = _apart(z, target)
    odds_t, rest_t, log_t = _apart(u, target)
    t = odds_t.sigmoid()
    value = t * (F.logsigmoid(odds_t) - F.logsigmoid(odds_s)) + (1 - t) * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
    value = value * alpha + dot(rest_t, log_t.sub_(log_s)) * beta
    if slope:
        pull = (odds_s.sigmoid() - t) * alpha
        torch.mul(rest_s, beta - pull, out=z).sub_(rest_t, alpha=beta).scatter_(1, target, pull)
    return value.squeeze(1)


def _apart(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The target's log-odds `(n, 1)`, and the law of the other tokens with its logarithm, the target at 0."""
    own = z.gather(1, target)
    top = z.scatter_(1, target, LOWEST).amax(1, keepdim=True)
    rest = z.sub_(top).exp()
    total = rest.sum(1, keepdim=True)
    z.sub_(total.log())
    return own - top - total.log(), rest.div_(total), z.scatter_(1, target, 0.0)


def cross_entropy(z: Tensor, target: Tensor, slope: bool, smoothing: float = 0.0) -> Tensor:
    """-sum p log s, p = (1 - e) [target] + e / V; gradient s - p."""
    target = target.unsqueeze(1)
    shifted(z)
    own = z.gather(1, target)
    value = own * (smoothing - 1)
    if smoothing:
        value = value - z.mean(1, keepdim=True) * smoothing
    z.exp_()
    total = z.sum(1, keepdim=True)
    value = value + total.log()
    if slope:
        z.div_(total)
        if smoothing:
            z.sub_(smoothing / z.shape[1])
        z.scatter_add_(1, target, torch.full_like(own, smoothing - 1))
    return value.squeeze(1)
