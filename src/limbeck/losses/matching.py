"""Distances between what two batches of samples do to a network: their gradients, the distributions of their features.

The synthetic side comes first, the real side second. Shapes: B samples, D features; `(..., B, D)` computes each leading index (a class)
by itself and sums over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.errors import UserError, unknown
from limbeck.losses._rows import wide

METRICS = ("rows", "mse", "cosine")


def gradient_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], metric: str = "rows") -> Tensor:
    """How far the gradient that synthetic samples give a network is from the one that real samples give it.

    "rows": sum over weights with at least two axes, reshaped to `(out, rest)`, and over their rows of 1 - cos(row, row); biases and
    norms count nothing (Zhao et al. 2021, arXiv:2006.05929, equation 10 and its code). "mse": squared distance of all entries.
    "cosine": 1 - cosine of all entries as one vector.

    Args:
        synthetic, real: one gradient a parameter, in the same order.

    >>> round(float(gradient_distance([torch.eye(3)], [-torch.eye(3)])), 3)
    6.0
    """
    if len(synthetic) != len(real):
        raise UserError(f"{len(synthetic)} gradients are compared with {len(real)}", "take both of the same parameters")
    if metric == "rows":
        terms = []
        for s, r in zip(synthetic, real):
            if s.ndim < 2:
                continue
            s, r = wide(s).flatten(1), wide(r).flatten(1)
            terms.append((1 - (s * r).sum(1) / (s.norm(dim=1) * r.norm(dim=1) + 1e-6)).sum())
        return torch.stack(terms).sum() if terms else sum(wide(s).sum() * 0 for s in synthetic)
    s, r = (torch.cat([wide(g).reshape(-1) for g in side]) for side in (synthetic, real))
    if metric == "mse":
        return ((s - r) ** 2).sum()
    if metric == "cosine":
        return 1 - (s * r).sum() / (s.norm() * r.norm() + 1e-6)
    raise unknown("gradient metric", metric, METRICS)


def mean_distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """Squared distance of the mean features, summed over features (Zhao & Bilen 2023, arXiv:2110.04181, equation 4).

    Args:
        synthetic: `(..., B, D)`. real: `(..., N, D)`; B and N may differ.

    >>> float(mean_distance(torch.zeros(3, 2), torch.ones(5, 2)))
    2.0
    """
    return ((wide(synthetic).mean(-2) - wide(real).mean(-2)) ** 2).sum()


def characteristic(features: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part `(..., K)` of the empirical characteristic function mean_b exp(i <t, f_b>).

    Args:
        features: `(..., B, D)`. frequencies: `(..., K, D)`.
    """
    angles = wide(features) @ wide(frequencies).transpose(-1, -2)
    return angles.cos().mean(-2), angles.sin().mean(-2)


def characteristic_discrepancy(synthetic: Tensor, real: Tensor, frequencies: Tensor, amplitude: float = 0.5, phase: float = 0.5) -> Tensor:
    """Mean over frequencies of sqrt(amplitude * (|P_r| - |P_s|)^2 + phase * 2 (|P_r||P_s| - Re(P_r conj P_s))).

    With both weights equal the root's content is that weight times |P_r - P_s|^2. (Wang et al. 2025, arXiv:2502.20653.)

    Args:
        synthetic: `(..., B, D)`; real: `(..., N, D)`; frequencies: `(..., K, D)`.
        amplitude, phase: what differences of the modulus (diversity) and of the angle (realism) count.

    Returns:
        a scalar: the sum over the leading axes of the mean over frequencies.

    >>> x = torch.eye(2)
    >>> float(characteristic_discrepancy(x, x, torch.ones(3, 2))) < 1e-5
    True
    """
    own_re, own_im = characteristic(synthetic, frequencies)
    re, im = characteristic(real, frequencies)
    # the root of a modulus has no finite gradient at zero
    own_size, size = (((a * a + b * b).clamp_min(1e-12)).sqrt() for a, b in ((own_re, own_im), (re, im)))
    amplitudes = (size - own_size) ** 2
    phases = (2 * (size * own_size - re * own_re - im * own_im)).clamp_min(1e-12)
    return (amplitude * amplitudes + phase * phases).clamp_min(1e-12).sqrt().mean(-1).sum()
