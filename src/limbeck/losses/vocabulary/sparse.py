"""A teacher that is a stored top-k: which divergences are defined, and how they reach the student's full logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses.vocabulary.chunks import Reader, block_rows, chosen, spans
from limbeck.losses.vocabulary.dense import dot, shifted
from limbeck.losses.vocabulary.law import LOWEST, Law, Sparse

EPSILON = 1e-8
"""The least mass a teacher's tail is given."""


def buckets(teacher: Sparse, rows: slice, inverse: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ids` (n, k) and logits `(n, k + 1)` of the k tokens and the tail, (1 - sum exp logs)^(1/T) before normalising; no tail at k = V."""
    ids, logs = teacher.ids[rows].long(), teacher.logs.detach()[rows].to(dtype).clamp(min=LOWEST)
    if ids.shape[1] < teacher.width:
        tail = (1 - logs.exp().sum(1, keepdim=True)).clamp(EPSILON, 1 - EPSILON).log()
        logs = torch.cat([logs, tail], 1)
    return ids, logs * inverse


def bucketed(kernel: Callable[..., Tensor], z: Tensor, ids: Tensor, u: Tensor, slope: bool, **shape: float) -> Tensor:
    """A dense kernel between the laws over k tokens and one tail; z `(n, V)` then holds the gradient.

    The student's tail has the logit log sum exp of the rest, so nothing is lost by subtraction; its gradient goes to the rest by share.
    """
    own = z.gather(1, ids)
    if u.shape[1] == ids.shape[1]:
        value = kernel(own, u, slope, **shape)
        if slope:
            z.zero_().scatter_(1, ids, own)
        return value
    top = z.scatter_(1, ids, LOWEST).amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    coarse = torch.cat([own, top + total.log()], 1)
    value = kernel(coarse, u, slope, **shape)
    if slope:
        z.mul_(coarse[:, -1:] / total).scatter_(1, ids, coarse[:, :-1])
    return value


def renormalised(z: Tensor, ids: Tensor, u: Tensor, slope: bool) -> Tensor:
    """KL(t || s) with t on the k tokens alone, normalised there, and s over the whole vocabulary; gradient s - t."""
    log_t = torch.log_softmax(u[:, : ids.shape[1]], 1)
    t = log_t.exp()
    own = shifted(z).gather(1, ids)
    total = z.exp_().sum(1, keepdim=True)
    value = dot(t, log_t - own) + total.log()
    if slope:
        z.div_(total).scatter_add_(1, ids, -t)
    return value.squeeze(1)


@torch.no_grad()
def top_k(law: Law, k: int, chunk: int | None = None) -> Sparse:
    """The k likeliest tokens of each position and their log-probabilities at temperature 1, without gradient, a chunk at a time.

    Args:
        law: N positions over V tokens.
        k: between 1 and V; entries come likeliest first.
        chunk: rows at a time; `chunk_rows` unless given.

    Returns:
        `Sparse` with int64 ids and logs in `law.dtype`.
    """
    if not 1 <= k <= law.width:
        raise UserError(f"top_k of {k} tokens from a vocabulary of {law.width}", "use k between 1 and the width")
    ids = torch.empty(len(law), k, dtype=torch.int64, device=law.device)
    logs = torch.empty(len(law), k, dtype=law.dtype, device=law.device)
    size = chosen(chunk, law)
    reader = Reader(law, size)
    for rows in spans(len(law), size):
        z = reader(rows)
        for part in spans(len(z), block_rows(law.width, law.device)):
            here = slice(rows.start + part.start, rows.start + part.stop)
            reader.finish(z[part], here)
            top, ids[here] = z[part].topk(k, 1)
            logs[here] = top - z[part].logsumexp(1, keepdim=True)
    return Sparse(ids, logs, law.width)
