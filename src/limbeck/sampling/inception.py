"""The Inception FID, for users who have torch-fidelity and its weights; nothing else in limbeck is called FID."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.places import user_path
from limbeck.report.sheets import write_each


def inception_fid(generated: Tensor, real: Tensor, weights: str | Path) -> float:
    """Frechet distance in the features of the Inception network of Heusel et al. 2017 (arXiv:1706.08500), as torch-fidelity computes it.

    Args:
        generated, real: `(N, 1 or 3, H, W)` pictures in [-1, 1]; they are handed over as PNG files of 8 bits, as is the custom.
        weights: torch-fidelity's file of Inception weights, which is not downloaded here.

    Raises:
        UserError: torch-fidelity (which needs torchvision) or the weights are not there.
    """
    weights = user_path(weights)
    if not weights.is_file():
        raise UserError(f"there are no Inception weights at {weights}", "name torch-fidelity's weights-inception-2015-12-05-6726825d.pth")
    try:
        fidelity = importlib.import_module("torch_fidelity")
    except ImportError as error:
        raise UserError(f"torch-fidelity cannot be used: {error}", "`pip install 'limbeck[fidelity]'`; it needs torchvision") from None
    with tempfile.TemporaryDirectory(prefix="limbeck-fid-") as folder:
        sides = {"generated": generated, "real": real}
        for name, pictures in sides.items():
            write_each(pictures.expand(-1, 3, -1, -1), Path(folder) / name)
        found = fidelity.calculate_metrics(
            input1=str(Path(folder) / "generated"),
            input2=str(Path(folder) / "real"),
            cuda=torch.cuda.is_available(),
            fid=True,
            feature_extractor_weights_path=str(weights),
            verbose=False,
        )
    return float(found["frechet_inception_distance"])
