"""What a network says about a whole split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.data.split import Split
from limbeck.signals import Reader, Signals
from limbeck.signals.modes import evaluating


@torch.no_grad()
def predict(
    model: nn.Module | Callable[[Batch], Signals], split: Split, batch: int = 512, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Logits and labels of every sample of a split, in its order, on the CPU.

    Args:
        model: put into evaluation mode for the pass, and back into its own mode afterwards; or a teacher, called with batches.
        split: where samples come from.
        batch: samples at a time.
        device: where the model lives.

    Returns:
        `(N, C)` float32 logits, and the labels as the batches carried them (None when there are none).
    """
    read = Reader(model, ("logits",)) if isinstance(model, nn.Module) else model
    logits, labels = [], []
    with evaluating(model):
        for part in Batches(split, batch, shuffle=False).epoch(0):
            part = part.to(device)
            logits.append(read(part).logits.float().cpu())
            if part.labels is not None:
                labels.append(part.labels.cpu())
    return torch.cat(logits), torch.cat(labels) if labels else None
