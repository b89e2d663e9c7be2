"""Losses of generators: score differences, score identities, adversarial games, robust distances, kernel discrepancies.

`x` is a generated batch `(B, ...)`; teacher and fake predictions of clean data have the same shape. Unlike elsewhere, score losses
detach what their papers hold constant, because that *is* the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError, unknown
from limbeck.losses._rows import wide

ADVERSARIAL = ("non-saturating", "hinge", "least-squares")


def field_loss(x: Tensor, direction: Tensor) -> Tensor:
    """0.5 mean (x - sg[x - d])^2: a number whose gradient with respect to x is d / numel, so that x moves along -d.

    Every score or velocity difference enters a generator so (Poole et al. 2022, arXiv:2209.14988; Yin et al. 2023, arXiv:2311.18828).

    Args:
        x, direction: `(B, ...)`.

    >>> x = torch.zeros(2, 3, requires_grad=True)
    >>> field_loss(x, torch.ones(2, 3)).backward()
    >>> float(x.grad[0, 0]) == 1 / 6 or round(float(x.grad[0, 0]), 6)
    0.166667
    """
    x = wide(x)
    return 0.5 * F.mse_loss(x, (x - wide(direction)).detach())


def pixel_distance(x: Tensor, other: Tensor) -> Tensor:
    """`(B, 1, ...)` mean absolute difference of each sample, without gradient: DMD's normaliser (arXiv:2311.18828, equation 8).

    >>> pixel_distance(torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 2.0, 0.0]]))
    tensor([[1.]])
    """
    size = (wide(x) - wide(other)).detach().abs().flatten(1).mean(1)
    return size.clamp_min(1e-6).reshape(-1, *(1,) * (x.ndim - 1))


def matching_direction(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """(X_F - X_T) / mean|x - X_T|: the normalised gradient of KL(generator || teacher) with respect to x (Yin et al. 2024,
    arXiv:2405.14867).

    Args:
        x: generated samples. teacher, fake: what the two networks see as clean data in the same re-noised x.

    >>> matching_direction(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[2.0, 1.0]]))
    tensor([[1., 0.]])
    """
    return torch.nan_to_num((wide(fake) - wide(teacher)).detach() / pixel_distance(x, teacher))


def score_identity(x: Tensor, teacher: Tensor, fake: Tensor, alpha: float = 1.0) -> Tensor:
    """mean_b mean_pix (X_T - X_F) ((X_T - x) - alpha (X_T - X_F)) / W with W = mean|x - X_T|; gradients run through all three.

    The Fisher divergence in a form that needs no gradient of the fake score's training (Zhou et al. 2024, arXiv:2404.04057, equation
    23). It has no lower bound. The paper sums over pixels; the mean keeps learning rates comparable between sizes.

    >>> score_identity(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2), alpha=0.5)
    tensor(0.5000)
    """
    x, teacher, fake = wide(x), wide(teacher), wide(fake)
    weight = pixel_distance(x, teacher).clamp_min(1e-5)
    gap = teacher - fake
    return (gap * ((teacher - x) - alpha * gap) / weight).flatten(1).mean(1).mean()


def critic_loss(real: Tensor, fake: Tensor, kind: str = "non-saturating") -> Tensor:
    """What a discriminator minimises, from its logits on real and on generated samples (any shapes; means are taken of each side).

    "non-saturating": softplus(fake) + softplus(-real) (Goodfellow et al. 2014, arXiv:1406.2661); "hinge": relu(1 - real) + relu(1 + fake)
    (Lim & Ye 2017, arXiv:1705.02894); "least-squares": (real - 1)^2 + fake^2 (Mao et al. 2016, arXiv:1611.04076).

    >>> critic_loss(torch.tensor([2.0]), torch.tensor([-0.5]), "hinge")
    tensor(0.5000)
    """
    real, fake = wide(real), wide(fake)
    if kind == "non-saturating":
        return F.softplus(fake).mean() + F.softplus(-real).mean()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "least-squares":
        return (real - 1).square().mean() + fake.square().mean()
    raise unknown("adversarial loss", kind, ADVERSARIAL)


def fooling_loss(fake: Tensor, kind: str = "non-saturating") -> Tensor:
    """What a generator minimises, from the discriminator's logits on its samples; see `critic_loss`.

    >>> fooling_loss(torch.tensor([2.0]), "hinge")
    tensor(-2.)
    """
    fake = wide(fake)
    if kind == "non-saturating":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    if kind == "least-squares":
        return (fake - 1).square().mean()
    raise unknown("adversarial loss", kind, ADVERSARIAL)


def gradient_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """0.5 mean_b |d sum(logits) / d real_b|^2 (R1, Mescheder et al. 2018, arXiv:1801.04406); differentiable.

    Args:
        logits: made from `real` with gradient. real: `(B, ...)`, requires gradient.

    >>> real = torch.ones(1, 2, requires_grad=True)
    >>> gradient_penalty(real.square().sum(1), real)
    tensor(4., grad_fn=<MulBackward0>)
    """
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return 0.5 * wide(slope).square().flatten(1).sum(1).mean()


def pseudo_huber(error: Tensor, scale: float = 0.00054) -> Tensor:
    """`(B,)` (sqrt(|e|^2 + c^2) - c) / d with c = scale * d, d numbers a sample (Song & Dhariwal 2023, arXiv:2310.14189; as in
    arXiv:2405.20320).

    Args:
        error: `(B, ...)`.

    >>> pseudo_huber(torch.tensor([[3.0, 4.0]]), scale=0.0)
    tensor([2.5000])
    """
    flat = wide(error).flatten(1)
    d = flat.shape[1]
    c = scale * d
    return ((flat.square().sum(1) + c * c).sqrt() - c) / d


def gaussian_mmd(generated: Tensor, real: Tensor) -> Tensor:
    """Biased squared discrepancy with k(u, v) = exp(-|u - v|^2 / 2D), features standardised by the real batch (without gradient).

    Args:
        generated: `(B, D)`. real: `(N, D)`.

    Returns:
        at least 0; about 1/B + 1/N for equal distributions (Gretton et al. 2012).

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> gaussian_mmd(x, x).abs() < 1e-6
    tensor(True)
    """
    if len(real) < 2:
        raise UserError(f"the kernel discrepancy needs the spread of the real batch, which has {len(real)} sample", "give two or more")
    generated, real = wide(generated), wide(real).detach()
    mean, std = real.mean(0), real.std(0).clamp_min(1e-4)
    u, v = (generated - mean) / std, (real - mean) / std
    width = 2 * u.shape[1]

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        # by differences: a^2 + b^2 - 2ab loses the distance of two samples that are far from the mean, and that of a sample to itself
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        return (-squares / width).exp().mean()

    return mean_kernel(u, u) + mean_kernel(v, v) - 2 * mean_kernel(u, v)
