"""Orthogonal matrices by the Cayley transform, and the rotation of one attention layer's keys and values.

MatryoshkaKV (arXiv 2410.14731): only the first coordinates of rotated keys and values are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.errors import UserError

KEYS, VALUES = 0, 1
"""Places of the two kinds in tensors of ranks `(2, H)`."""


def cayley(x: Tensor) -> Tensor:
    """Orthogonal U = (I - A/2)^-1 (I + A/2) with A = X - X^T, computed in float32 (float64 for float64) by a linear solve.

    Args:
        x: `(..., d, d)` free parameters.

    Returns:
        `(..., d, d)`; U^T U = I and det U = 1. U = I for X = 0.
    """
    wide = x if x.dtype is torch.float64 else x.float()
    half = (wide - wide.mT) / 2
    eye = torch.eye(x.shape[-1], dtype=wide.dtype, device=x.device)
    return torch.linalg.solve(eye - half, eye + half)


def signs_for_cayley(u: Tensor) -> Tensor:
    """Signs of columns, so that the Cayley transform reaches `u * signs`.

    A matrix with the eigenvalue -1 (all of determinant -1 have it) is no Cayley transform. Elimination of U + diag(s), where each s_j takes
    the sign of the pivot that it is added to, has pivots of at least 1, so U diag(s) + I is far from singular.

    Args:
        u: `(..., d, d)` orthogonal.

    Returns:
        `(..., d)` of -1 and 1.
    """
    rest, signs = u.double().clone(), []
    for j in range(u.shape[-1]):
        sign = torch.where(rest[..., j, j] < 0, -1.0, 1.0).to(rest)
        pivot = rest[..., j, j] + sign
        column, row = rest[..., j + 1 :, j : j + 1], rest[..., j : j + 1, j + 1 :]
        rest[..., j + 1 :, j + 1 :] -= column * row / pivot[..., None, None]
        signs.append(sign)
    return torch.stack(signs, -1).to(u.dtype)


def inverse_cayley(u: Tensor) -> tuple[Tensor, Tensor]:
    """(X, s) with cayley(X) = U diag(s): A = 2 (U' - I)(I + U')^-1 for U' = U diag(s), X = the strictly lower triangle of (A - A^T) / 2.

    Args:
        u: `(..., d, d)` orthogonal, of either determinant. A change of a column's sign changes no subspace that leading columns span.

    Returns:
        `(..., d, d)` strictly lower triangular, and `(..., d)` signs.

    Raises:
        UserError: columns that are not orthonormal.
    """
    wide = u.double()
    eye = torch.eye(u.shape[-1], dtype=wide.dtype, device=u.device)
    gap = float((wide.mT @ wide - eye).abs().max())
    if not gap < 1e-3:
        raise UserError(f"a rotation's columns are off orthonormal by {gap:.1e}", "give an orthogonal matrix")
    signs = signs_for_cayley(wide)
    turned = wide * signs.unsqueeze(-2)
    a = 2 * torch.linalg.solve((eye + turned).mT, (turned - eye).mT).mT
    return ((a - a.mT) / 2).tril(-1).to(u.dtype), signs.to(u.dtype)


class Rotation(nn.Module):
    """Orthogonal rotations and means of the keys and values of one attention layer, and how many coordinates each head keeps.

    The stored keys are ((k - m_k) U_k)[:r_k], the stored values ((v - m_v) U_v)[:r_v]; queries meet keys as q U_k, what attention mixes
    is turned back by U_v and gets m_v again. q m_k, the same for all keys of a query, drops out of the softmax and is not computed; for the
    same reason no gradient reaches m_k, which is a buffer.

    Args:
        heads: H key and value heads (with grouped queries fewer than query heads: one rotation for what one cache entry serves).
        width: d, the size of a head.

    Attributes:
        free: `(2, H, d, d)` parameters of the Cayley transforms, keys first.
        key_mean, value_mean: `(H, d)`.
        ranks: `(2, H)` whole numbers in float32, because averages of weights would round integers; saved with the weights.
        stored: keys and values come out of a cache that holds them rotated.
        moments: where keys and values are summed up while it is set.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.free = nn.Parameter(torch.zeros(2, heads, width, width))
        self.register_buffer("key_mean", torch.zeros(heads, width))
        self.value_mean = nn.Parameter(torch.zeros(heads, width))
        self.register_buffer("ranks", torch.full((2, heads), float(width)))
        self.stored = False
        self.moments: Moments | None = None
        self._made: tuple[tuple[int, int, torch.device], Tensor] | None = None

    def matrices(self) -> Tensor:
        """`(2, H, d, d)` U_k and U_v; without gradient made once for each state of the parameters."""
        if torch.is_grad_enabled():
            return cayley(self.free)
        mark = (self.free._version, self.free.data_ptr(), self.free.device)
        if self._made is None or self._made[0] != mark:
            self._made = (mark, cayley(self.free))
        return self._made[1]

    def kept(self, kind: int) -> Tensor:
        """`(H, d)` 1 on coordinates that are kept, else 0."""
        places = torch.arange(self.width, device=self.ranks.device, dtype=self.ranks.dtype)
        return (places < self.ranks[kind].unsqueeze(1)).to(self.free.dtype)

    def keys(self, k: Tensor, u: Tensor) -> Tensor:
        """Rotated keys of `(B, H, L, d)` with zeros for the coordinates that are cut."""
        return _turn(k, self.key_mean, u[KEYS], self.kept(KEYS))

    def values(self, v: Tensor, u: Tensor) -> Tensor:
        """Rotated values, likewise."""
        return _turn(v, self.value_mean, u[VALUES], self.kept(VALUES))

    def queries(self, q: Tensor, u: Tensor) -> Tensor:
        """`(B, Q, L, d)` queries, Q a multiple of H, turned by the matrices of the keys that they meet."""
        turned = q.unflatten(1, (self.heads, -1)) @ u[KEYS].to(q.dtype).unsqueeze(1)
        return turned.flatten(1, 2)

    def back(self, mixed: Tensor, u: Tensor) -> Tensor:
        """`(B, L, Q, d)` of mixed rotated values in the coordinates of the output projection."""
        grouped = mixed.unflatten(2, (self.heads, -1))
        turned = torch.einsum("blhge,hde->blhgd", grouped, u[VALUES].to(mixed.dtype))
        return (turned + self.value_mean.to(mixed.dtype).unsqueeze(1)).flatten(2, 3)

    @torch.no_grad()
    def start(self, means: Tensor, bases: Tensor) -> None:
        """Take means `(2, H, d)` and orthogonal bases `(2, H, d, d)`, leading directions first."""
        free, _ = inverse_cayley(bases)
        self.free.copy_(free)
        self.key_mean.copy_(means[KEYS])
        self.value_mean.copy_(means[VALUES])


def _turn(x: Tensor, mean: Tensor, u: Tensor, kept: Tensor) -> Tensor:
    centred = x - mean.to(x.dtype).unsqueeze(1)
    return centred @ (u * kept.unsqueeze(1)).to(x.dtype)


class Moments:
    """Sums of keys and values and of their outer products over positions, in float64.

    Attributes:
        keep: `(B, L)` true on positions to count; set before each batch; None counts all.
    """

    def __init__(self, heads: int, width: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(2, heads, width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(2, heads, width, width, dtype=torch.float64, device=device)
        self.keep: Tensor | None = None

    @torch.no_grad()
    def add(self, keys: Tensor, values: Tensor) -> None:
        """Count keys and values `(B, H, L, d)` of one layer."""
        for kind, x in ((KEYS, keys), (VALUES, values)):
            rows = x.transpose(1, 2).flatten(0, 1).double()  # (B L, H, d)
            if self.keep is not None:
                rows = rows[self.keep.flatten()]
            self.total[kind] += rows.sum(0)
            self.outer[kind] += torch.einsum("nhd,nhe->hde", rows, rows)
        self.count += len(rows)

    def principal(self, centred: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Means `(2, H, d)`, eigenvectors `(2, H, d, d)` as columns by falling eigenvalue, eigenvalues `(2, H, d)`.

        Of E[k k^T] - m m^T; with `centred` false of E[k k^T], and the means are 0.
        """
        means = self.total / self.count
        if not centred:
            means = torch.zeros_like(means)
        covariance = self.outer / self.count - means.unsqueeze(-1) * means.unsqueeze(-2)
        values, vectors = torch.linalg.eigh(covariance)
        return means, vectors.flip(-1), values.flip(-1)
