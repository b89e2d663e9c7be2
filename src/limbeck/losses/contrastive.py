"""Pull what belongs together, push the rest apart. Shapes: embeddings `(B, D)`, scaled to length 1 unless `normalize=False`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses._rows import check_positive, check_rows, check_same, reduce_rows, unit, wide


def _unit(x: Tensor, normalize: bool) -> Tensor:
    x = wide(x)
    return unit(x) if normalize else x


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negatives: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    weight: Tensor | None = None,
) -> Tensor:
    """mean_i -log( exp(q_i k_i / T) / sum_j exp(q_i k_j / T) ): each query finds its own key.

    Van den Oord et al., CPC (arXiv 1807.03748); `symmetric` as in CLIP (arXiv 2103.00020); `negatives` as in MoCo (arXiv 1911.05722).

    Args:
        queries: `(B, D)`.
        keys: `(B, D)`, row i belongs to query i.
        temperature: T, a number or a scalar tensor.
        negatives: `(K, D)` for all queries or `(B, K, D)` for each; they *replace* the other keys of the batch.
        symmetric: mean of queries-find-keys and keys-find-queries.
        normalize: scale embeddings to length 1.
        weight: `(B,)` a factor a query.

    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)  # ln(1 + 1/e)
    tensor(0.3133)
    """
    check_same(queries, keys, "queries and keys")
    check_positive(temperature)
    q, k = _unit(queries, normalize), _unit(keys, normalize)
    if negatives is None:
        logits = q @ k.mT / temperature
        own = torch.arange(len(q), device=q.device)
        rows = F.cross_entropy(logits, own, reduction="none")
        if symmetric:
            rows = (rows + F.cross_entropy(logits.mT, own, reduction="none")) / 2
        return reduce_rows(rows, None, weight)
    if symmetric:
        raise UserError("symmetric InfoNCE cannot take negatives", "leave `negatives` out, or use symmetric=False")
    n = _unit(negatives, normalize)
    others = q @ n.mT if n.ndim == 2 else torch.einsum("bd,bkd->bk", q, n)
    logits = torch.cat([(q * k).sum(-1, keepdim=True), others], 1) / temperature
    return reduce_rows(logits.logsumexp(1) - logits[:, 0], None, weight)


def supervised_contrastive(
    embeddings: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.1, normalize: bool = True, ignore: int = -1
) -> Tensor:
    """mean_i -1/|P(i)| sum_{p in P(i)} log( exp(z_i z_p / T) / sum_{a != i} exp(z_i z_a / T) ), P(i) = others with i's label.

    Rows labelled `ignore` take no part. The mean runs over rows that have a partner; without any it is zero. Khosla et al.
    (arXiv 2004.11362, the form with the sum outside).

    >>> supervised_contrastive(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), temperature=1.0)  # ln(1 + 2/e)
    tensor(0.5514)
    """
    check_rows(embeddings.shape[:-1], labels, "label")
    check_positive(temperature)
    z = _unit(embeddings, normalize)
    known = labels != ignore
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    hidden = itself | ~known.unsqueeze(0)
    partner = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~hidden & known.unsqueeze(1)
    # Finite on purpose: a row whose every column is hidden must stay free of NaN.
    log_p = F.log_softmax((z @ z.mT / temperature).masked_fill(hidden, torch.finfo(z.dtype).min / 4), 1)
    count = partner.sum(1)
    rows = -log_p.masked_fill(~partner, 0).sum(1) / count.clamp(min=1)
    return reduce_rows(rows, count > 0)
