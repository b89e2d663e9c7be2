"""Any differentiable function of logits, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.errors import UserError
from limbeck.losses.vocabulary.chunks import chosen, spans
from limbeck.losses.vocabulary.law import Law


def rowwise(function: Callable[..., Tensor], student: Law, *others: Law | Tensor, chunk: int | None = None) -> Tensor:
    """`function(logits, *others)` for chunks of rows, computed again in the backward pass: one chunk in memory, any loss.

    Args:
        function: takes `(n, V)` logits of the student in float32 and, for each of `others`, the same rows: logits `(n, V)` of a `Law`,
            entries `(n, ...)` of a tensor. Returns `(n,)`. It must treat rows apart from each
            other (or those of a chunk together, where `chunk` says which these are) and give the same when called again (torch's
            random state is put back).
        student: N positions.
        others: laws or tensors `(N, ...)`. Gradients pass through them as well; a teacher is detached by the caller.
        chunk: rows at a time; `chunk_rows` unless given.

    Returns:
        `(N,)`, empty for an empty law but still in the graph.
    """
    for other in others:
        if len(other) != len(student):
            raise UserError(f"the student has {len(student)} rows, another input {len(other)}", "take the same positions of all")

    def part(rows: slice) -> Tensor:
        taken = [other.logits(rows) if isinstance(other, Law) else other[rows] for other in others]
        values = function(student.logits(rows), *taken)
        if values.shape != (rows.stop - rows.start,):
            raise UserError(
                f"the function gave {tuple(values.shape)} for {rows.stop - rows.start} rows", "it must return one value a row: (n,)"
            )
        return values

    if not len(student):
        return student.logits().sum(1)
    recorded = torch.is_grad_enabled()
    parts = [
        checkpoint(part, rows, use_reentrant=False) if recorded else part(rows) for rows in spans(len(student), chosen(chunk, student))
    ]
    return torch.cat(parts)
