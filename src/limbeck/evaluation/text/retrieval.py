"""Finding the right document for a query among many, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.errors import UserError

_BLOCK = 2**22  # similarities at a time: 16 MiB
_ROUNDING = 16 * torch.finfo(torch.float32).eps


def ranks(queries: Tensor, documents: Tensor, pool: int | None = None, seed: int = 0) -> Tensor:
    """Rank of each query's own document, 1 the best; a document that is as near as the right one stands before it.

    So an encoder that gives one vector for everything has the worst rank everywhere, not the best. Cosines closer than the rounding of
    float32 (16 eps, about 2e-6) count as equal, because equal vectors need not give equal sums. A text that occurs twice among the
    documents therefore stands before itself: leave duplicates out of the set.

    Args:
        queries, documents: `(N, D)`; row i of the one belongs to row i of the other. Compared by cosine; a zero vector is as near to all.
        pool: candidates a query, its own document among them: queries are dealt by `seed` into pools of this size, each pool a small
            collection of its own, so that figures of test sets of different sizes can be compared. What is left over (N modulo pool) is
            not scored. None: all documents are candidates.
        seed: of the dealing.

    Returns:
        `(M,)` int64, M = N, or N // pool * pool.

    Raises:
        UserError: shapes that differ, values that are not finite, a pool larger than the set or smaller than 2.
    """
    queries, documents = _unit("query", queries), _unit("document", documents)
    if queries.shape != documents.shape:
        raise UserError(
            f"query embeddings of shape {tuple(queries.shape)}, document embeddings of shape {tuple(documents.shape)}",
            "row i of the queries must belong to row i of the documents, in one space",
        )
    count = len(queries)
    size = count if pool is None else pool
    if size < 2 or size > count:
        raise UserError(f"pools of {size} candidates from {count} pairs", f"take a pool from 2 to {count}, or give more pairs")
    if pool is None:
        return _ranks(queries, documents)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(queries.device)
    parts = [order[start : start + size] for start in range(0, count // size * size, size)]
    return torch.cat([_ranks(queries[part], documents[part]) for part in parts])


def _unit(name: str, rows: Tensor) -> Tensor:
    if rows.ndim != 2 or not rows.shape[1]:
        raise UserError(f"{name} embeddings of shape {tuple(rows.shape)}", "give one row a text, (N, D)")
    rows = rows.detach().float()
    if bad := int((~rows.isfinite()).sum()):
        raise UserError(f"{bad} values of the {name} embeddings are not finite", "look at those texts: did training diverge?")
    return torch.nn.functional.normalize(rows, dim=-1)


def _ranks(queries: Tensor, documents: Tensor) -> Tensor:
    step = max(1, _BLOCK // len(documents))
    found = []
    for start in range(0, len(queries), step):
        near = queries[start : start + step] @ documents.mT
        own = near.gather(1, torch.arange(start, start + len(near), device=near.device)[:, None])
        found.append((near >= own - _ROUNDING).sum(1))  # the right one itself is among them
    return torch.cat(found)


def retrieval(
    queries: Tensor, documents: Tensor, *, pool: int | None = None, at: Sequence[int] = (1, 5, 10), seed: int = 0
) -> dict[str, float]:
    """Measures of retrieval with one right document a query. Arguments as in `ranks`.

    recall@k: share of queries whose document is among the first k. mrr: mean of 1 / rank. ndcg@10: mean of 1 / log2(1 + rank) up to
    rank 10, 0 behind it (one relevant document, so the ideal sum is 1; Järvelin & Kekäläinen 2002).

    Args:
        at: the k of recall.

    Returns:
        `recall@k` for each k, `mrr`, `ndcg@10`, each in [0, 1], larger is better; `candidates`, how many each query chose from: read the
        figures beside chance, k / candidates.
    """
    if any(k < 1 for k in at):
        raise UserError(f"recall at {min(at)}", "take k = 1 or more; 1, 5 and 10 are usual")
    place = ranks(queries, documents, pool, seed).double()
    gain = torch.where(place <= 10, 1 / torch.log2(1 + place), 0.0)
    figures = {f"recall@{k}": float((place <= k).double().mean()) for k in at}
    return figures | {"mrr": float((1 / place).mean()), "ndcg@10": float(gain.mean()), "candidates": float(pool or len(queries))}
