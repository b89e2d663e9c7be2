"""A selective scan with a diagonal decay for every head, in chunks.

The scan inside transformers' Mamba shares B and C over all channels; that of its Mamba 2 has heads, but one decay a head, sits inside a
module with a gated norm that cannot be the identity, and has no place for a normaliser. Neither can hold what linear attention needs
(B and C of each head, and sums of weights beside sums of values), so the scan is written here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    u: Tensor, b: Tensor, c: Tensor, dt: Tensor, a: Tensor, state: Tensor | None = None, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t b_t u_t^T, y_t = h_t^T c_t for every head, in float32 (float64 for float64).

    Inside a chunk the sums are a triangular matrix product with the decays between its places (all at most 1, so nothing overflows); from
    chunk to chunk the state is passed on.

    Args:
        u: `(B, L, G, P)` inputs.
        b: `(B, L, G, N)` how they enter the state.
        c: `(B, L, G, R, N)` how the state is read, R times for each head.
        dt: `(B, L, G)` steps, at least 0.
        a: `(G, N)` at most 0.
        state: `(B, G, N, P)` before the first place; None is 0.
        chunk: places at a time.

    Returns:
        `(B, L, G, R, P)`, and the state behind the last place.
    """
    wide = torch.float64 if u.dtype is torch.float64 else torch.float32
    u, b, c, dt, a = (x.to(wide) for x in (u, b, c, dt, a))
    size, length, groups, inputs = u.shape
    h = u.new_zeros(size, groups, b.shape[-1], inputs) if state is None else state.to(wide)
    given = u * dt.unsqueeze(-1)
    said = []
    for first in range(0, length, chunk):
        part = slice(first, first + chunk)
        decay = (dt[:, part].unsqueeze(-1) * a).cumsum(1).transpose(1, 2)  # (B, G, T, N) logarithms, falling with time
        within = decay.unsqueeze(3) - decay.unsqueeze(2)  # (B, G, T, S, N)
        later = torch.ones(within.shape[2:4], dtype=torch.bool, device=u.device).triu(1)
        within = within.masked_fill(later.unsqueeze(-1), float("-inf")).exp()
        weights = torch.einsum("btgrn,bsgn,bgtsn->bgrts", c[:, part], b[:, part], within)
        y = torch.einsum("bgrts,bsgp->btgrp", weights, given[:, part])
        said.append(y + torch.einsum("btgrn,bgtn,bgnp->btgrp", c[:, part], decay.exp(), h))
        rest = (decay[:, :, -1:] - decay).exp()
        h = decay[:, :, -1].exp().unsqueeze(-1) * h + torch.einsum("bsgn,bgsn,bsgp->bgnp", b[:, part], rest, given[:, part])
    return torch.cat(said, 1), h
