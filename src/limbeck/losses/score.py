"""Score distillation: what a frozen noise predictor and another prediction say about a rendering, and how it moves the rendering.

All predictions are of the injected noise, `(B, ...)`. The score of the diffused distribution is -prediction / sigma, so a difference of two
predictions is a difference of two scores. The methods differ in the prediction that is subtracted:

    SDS   prior - noise                              Poole et al. 2022, arXiv:2209.14988
    VSD   prior - follower                           Wang et al. 2023, arXiv:2305.16213
    ESD   prior - entropic(follower of all, of this) Wang et al. 2023, arXiv:2401.00909
    ASD   prior - prior at a noisier time            Ma et al. 2024, arXiv:2407.02040
    BSD   the least-norm point between two of them   Huang et al. 2024, arXiv:2407.13976

Everything here is a direction, not a loss: networks are evaluated without gradient, and `score_surrogate` alone enters backpropagation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError, unknown
from limbeck.losses._rows import wide

WEIGHTS = ("sds", "uniform", "fantasia3d")
"""Names of `level_weight`."""


def _column(value: Tensor, like: Tensor) -> Tensor:
    """`(B,)` numbers shaped for broadcasting over `(B, ...)`."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def score_surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """0.5 sum (x - sg[x - g])^2 / B: a number whose gradient with respect to x is exactly g / B (not averaged over pixels).

    `losses.field_loss` is the same thing averaged over pixels, as one-step generators use it; learning rates of papers on score
    distillation assume the sum.

    Args:
        x: `(B, ...)` renderings. gradient: `(B, ...)`, taken as it is; numbers that are not finite count as 0.

    >>> x = torch.zeros(2, 3, requires_grad=True)
    >>> score_surrogate(x, torch.ones(2, 3)).backward()
    >>> x.grad[0]
    tensor([0.5000, 0.5000, 0.5000])
    """
    x = wide(x)
    gradient = torch.nan_to_num(wide(gradient), 0.0, 0.0, 0.0)
    return 0.5 * (x - (x - gradient).detach()).square().sum() / len(x)


def guided_prediction(free: Tensor, given: Tensor, scale: float) -> Tensor:
    """free + scale (given - free): classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); scale 1 is `given`.

    >>> guided_prediction(torch.zeros(1), torch.ones(1), 7.5)
    tensor([7.5000])
    """
    free, given = wide(free), wide(given)
    return free + scale * (given - free)


def entropic_prediction(marginal: Tensor, conditional: Tensor, lam: float) -> Tensor:
    """lam marginal + (1 - lam) conditional: the follower's prediction of entropic score distillation (arXiv:2401.00909, theorem 1).

    It equals guidance of the follower by 1 - lam; lam 0 leaves variational score distillation, lam 1 the mixture of all views alone.

    Args:
        marginal: what the follower says when it is not told the view. conditional: when it is.

    >>> entropic_prediction(torch.zeros(1), torch.ones(1), 0.25)
    tensor([0.7500])
    """
    return guided_prediction(marginal, conditional, 1 - lam)


def least_norm(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The point of least norm on the segment between two vectors, for each sample.

    share = clip(<b - a, b> / |b - a|^2, 0, 1), point = share a + (1 - share) b: the common descent direction of two objectives (Desideri
    2012; Sener & Koltun 2018, arXiv:1810.04650). Equal vectors are their own answer.

    Args:
        a, b: `(B, ...)`.

    Returns:
        the points `(B, ...)` and the shares of `a` `(B,)`.

    >>> point, share = least_norm(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    >>> point, share
    (tensor([[0.5000, 0.5000]]), tensor([0.5000]))
    """
    a, b = wide(a), wide(b)
    gap = (b - a).flatten(1)
    size = gap.square().sum(1)
    share = ((gap * b.flatten(1)).sum(1) / size.clamp_min(torch.finfo(a.dtype).tiny)).clamp(0, 1)
    return _column(share, a) * a + _column(1 - share, b) * b, share


def level_weight(angle: Tensor, kind: str = "sds") -> Tensor:
    """`(B,)` weight of a noise level, from its angle atan2(sigma, alpha), so that a level weighs the same in every process.

    With abar = cos^2(angle): "sds" is 1 - abar, "uniform" 1, "fantasia3d" sqrt(abar) (1 - abar).

    >>> level_weight(torch.tensor([torch.pi / 2]))
    tensor([1.])
    """
    angle = wide(angle)
    if kind == "sds":
        return angle.sin().square()
    if kind == "uniform":
        return torch.ones_like(angle)
    if kind == "fantasia3d":
        return angle.cos() * angle.sin().square()
    raise unknown("weight of noise levels", kind, WEIGHTS)


def later_place(place: Tensor, eta: float, low: float, share: Tensor | float = 1.0) -> Tensor:
    """A noisier place for each place in [0, 1] of a process (0 data, 1 noise): place + share min(eta (place - low), 1 - place).

    The shift of asynchronous score distillation (arXiv:2407.02040), in continuous time: nearer to noise, which is earlier in sampling.

    Args:
        place: `(B,)`. eta: the greatest shift as a share of the way from `low`. share: in [0, 1], one for all or `(B,)`.

    >>> later_place(torch.tensor([0.5, 0.98]), 0.1, 0.0)
    tensor([0.5500, 1.0000])
    """
    place = wide(place)
    return place + share * torch.minimum(eta * (place - low).clamp_min(0), 1 - place)


def annealed(
    first: tuple[float, float], last: tuple[float, float], progress: float, kind: str = "step", at: float = 0.2
) -> tuple[float, float]:
    """The range of noise levels at a share of the run.

    Args:
        first, last: (low, high) at the beginning and at the end, places in [0, 1].
        progress: 0 at the beginning, 1 at the end.
        kind: "step": `first` before the share `at` of the run, `last` from there (arXiv:2305.16213: after 5000 of 25000 steps); "linear":
            from one to the other (arXiv:2407.02040).

    >>> annealed((0.02, 0.98), (0.02, 0.5), 0.5)
    (0.02, 0.5)
    >>> annealed((0.5, 0.98), (0.02, 0.5), 0.5, "linear")
    (0.26, 0.74)
    """
    for low, high in (first, last):
        if not 0 <= low < high <= 1:
            raise UserError(f"noise levels from {low} to {high}", "give 0 <= low < high <= 1")
    if kind == "step":
        return tuple(first) if progress < at else tuple(last)
    if kind == "linear":
        done = min(max(progress, 0.0), 1.0)
        return first[0] + done * (last[0] - first[0]), first[1] + done * (last[1] - first[1])
    raise unknown("annealing of noise levels", kind, ("step", "linear"))
