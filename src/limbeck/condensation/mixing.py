"""Mixing the samples of a batch in pairs: mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899).

Random numbers come from torch's global generator. Shapes: `(B, C, H, W)` pictures (mixup takes any `(B, ...)`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError, unknown

KINDS = ("mixup", "cutmix")


def _beta(alpha: float) -> float:
    """One draw of Beta(alpha, alpha)."""
    first, second = torch._standard_gamma(torch.tensor([alpha, alpha], dtype=torch.float64)).tolist()
    return first / (first + second) if first + second > 0 else 0.5


def mixup(x: Tensor, alpha: float = 0.8) -> tuple[Tensor, Tensor, float, None]:
    """`lam * x + (1 - lam) * x[other]`, one lam ~ Beta(alpha, alpha) for the batch.

    Returns:
        the mixed batch, the partner `(B,)` of each sample, lam (the first one's share), and None for a box.
    """
    lam, other = _beta(alpha), torch.randperm(len(x)).to(x.device)
    return lam * x + (1 - lam) * x[other], other, lam, None


def cutmix(x: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor, float, tuple[int, int, int, int]]:
    """A box of each picture is replaced by the same box of another one.

    The box covers a share 1 - lam of the picture, lam ~ Beta(alpha, alpha), around a uniform centre, clipped at the border.

    Returns:
        the mixed batch, the partner `(B,)`, the share of the picture that stayed, and the box (top, bottom, left, right).
    """
    if x.ndim != 4:
        raise UserError(f"cutmix needs pictures (B, C, H, W), the samples have shape {tuple(x.shape)}", "use mixup")
    lam, other = _beta(alpha), torch.randperm(len(x)).to(x.device)
    height, width = x.shape[-2:]
    side = (1 - lam) ** 0.5
    tall, wide = int(height * side), int(width * side)
    row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = max(0, row - tall // 2), min(height, row + tall // 2)
    left, right = max(0, column - wide // 2), min(width, column + wide // 2)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[other][:, :, top:bottom, left:right]
    return mixed, other, 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


def mix(kind: str, x: Tensor, alpha: float) -> tuple[Tensor, Tensor, float, tuple[int, int, int, int] | None]:
    """`mixup` or `cutmix` by name."""
    if kind not in KINDS:
        raise unknown("kind of mixing", kind, KINDS)
    return mixup(x, alpha) if kind == "mixup" else cutmix(x, alpha)


def mix_pairs(kind: str, x: Tensor, rows: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixed inputs, and rows `(B, K)` (logits, probabilities) interpolated with the same share.

    Raises:
        UserError: `rows` are class numbers, which cannot be interpolated.
    """
    if rows.ndim != 2:
        raise UserError("class numbers cannot be mixed", "give a row of probabilities or logits for each sample")
    mixed, other, share, _ = mix(kind, x, alpha)
    return mixed, share * rows + (1 - share) * rows[other]
