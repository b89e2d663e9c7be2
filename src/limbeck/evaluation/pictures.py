"""How near pictures are to true ones: PSNR, and SSIM by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError

SMALLEST = 11
"""The side of SSIM's window (Wang et al. 2004): smaller pictures have none."""


def psnr(made: Tensor, truth: Tensor) -> Tensor:
    """`(N,)` peak signal-to-noise ratios in dB of pictures `(N, C, H, W)` in [0, 1]: 10 log10(1 / mean squared error).

    Equal pictures get 100 dB, so that means stay finite.

    Raises:
        UserError: the shapes differ.
    """
    if made.shape != truth.shape:
        raise UserError(f"pictures of shape {tuple(made.shape)} against {tuple(truth.shape)}", "give both sides the same views and size")
    error = (made.double() - truth.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(1e-10).log10()).float()


def picture_quality(made: Tensor, truth: Tensor) -> dict[str, float]:
    """`psnr`: mean over pictures, in dB; `worst_psnr`: of the worst one; `ssim`: mean structural similarity, where pictures are large
    enough for its window.

    Args:
        made, truth: `(N, C, H, W)` in [0, 1].
    """
    each = psnr(made, truth)
    found = {"psnr": float(each.mean()), "worst_psnr": float(each.min())}
    if min(made.shape[-2:]) >= SMALLEST:
        from torchmetrics.functional.image import structural_similarity_index_measure

        with torch.no_grad():
            found["ssim"] = float(structural_similarity_index_measure(made.float(), truth.float(), data_range=1.0))
    return found
