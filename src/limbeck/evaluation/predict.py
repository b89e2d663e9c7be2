"""What a network says about a whole split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.data.batches import Batches
from limbeck.data.split import Split
from limbeck.signals import Reader


@torch.no_grad()
def predict(model: nn.Module, split: Split, batch: int = 512, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Logits and labels of every sample of a split, in its order, on the CPU.

    Args:
        model: put into evaluation mode for the pass, and back into its own mode afterwards.
        split: where samples come from.
        batch: samples at a time.
        device: where the model lives.

    Returns:
        `(N, C)` float32 logits, and the labels as the batches carried them (None when there are none).
    """
    reader = Reader(model, ("logits",))
    was_training = model.training
    model.eval()
    logits, labels = [], []
    try:
        for part in Batches(split, batch, shuffle=False).epoch(0):
            part = part.to(device)
            logits.append(reader(part.inputs).logits.float().cpu())
            if part.labels is not None:
                labels.append(part.labels.cpu())
    finally:
        model.train(was_training)
    return torch.cat(logits), torch.cat(labels) if labels else None
