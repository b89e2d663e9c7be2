"""What a network says about a whole split."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.data.split import Split
from limbeck.signals import Reader, Signals
from limbeck.signals.modes import evaluating


@torch.no_grad()
def predict(
    model: nn.Module | Callable[[Batch], Signals], split: Split, batch: int = 512, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Logits and labels of every sample of a split, in its order, on the CPU; several processes share the work, and each gets it all.

    Args:
        model: put into evaluation mode for the pass, and back into its own mode afterwards; or a teacher, called with batches.
        split: where samples come from.
        batch: samples at a time.
        device: where the model lives.

    Returns:
        `(N, C)` float32 logits, and the labels as the batches carried them (None when there are none).
    """
    read = Reader(model, ("logits",)) if isinstance(model, nn.Module) else model
    found: list[tuple[Tensor, Tensor | None]] = []
    with evaluating(model):
        for part, counts in shared_batches(split, batch):
            part = part.to(device)
            logits = read(part).logits.float().cpu()
            if counts:
                found.append((logits, None if part.labels is None else part.labels.cpu()))
    found = processes.in_order(processes.every(found))
    labels = [own for _, own in found if own is not None]
    return torch.cat([logits for logits, _ in found]), torch.cat(labels) if labels else None


def shared_batches(split: Split, batch: int) -> Iterator[tuple[Batch, bool]]:
    """The batches of a split that are this process's to read, in order, each with whether it counts; see `limbeck.processes.shared`."""
    batches = Batches(split, batch, shuffle=False)
    if processes.world() == 1 or not split.random_access:
        # a stream comes in its own order: every process reads it, and process 0's reading counts
        yield from ((part, processes.rank() == 0) for part in batches.epoch(0))
        return
    for step, counts in processes.shared(range(len(batches))):
        yield batches.batch_at(0, step), counts
