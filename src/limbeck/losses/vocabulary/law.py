"""Next-token distributions whose logits are not built: `Law` (hidden rows and an output matrix) and `Sparse` (a stored top-k)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.errors import UserError

LOWEST = -1e30
"""What a logit of -inf counts as: its probability is 0 in every dtype, and 0 * LOWEST is 0 where 0 * -inf is NaN."""

Rows = Tensor | slice | int | list[int]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _rows(index: Rows, count: int) -> Rows:
    """An index that keeps the axis of rows."""
    if isinstance(index, int):
        if not -count <= index < count:
            raise UserError(f"row {index} of a law of {count} rows", "rows count from 0; negative numbers count from the end")
        return slice(index % count, index % count + 1)
    return index


@dataclass(frozen=True)
class Law:
    """Next-token distributions of N positions: softmax over the first `vocabulary` entries of `softcap(scale * (hidden W^T + bias))`.

    Either `hidden` and `weight`, or `dense`. Nothing is computed until a loss asks, and then a few rows at a time.
    Masked positions are simply not among the rows: `law[mask]`.

    Args:
        hidden: `(N, d)` what goes into the output matrix.
        weight: `(V, d)` the output matrix.
        bias: `(V,)`.
        scale: a factor of the logits (Granite, Cohere).
        softcap: c > 0, logits become c * tanh(logits / c) (Gemma 2).
        dense: `(N, V)` the logits themselves, for models whose head is not a matrix; instead of everything above.
        vocabulary: only the first so many columns are tokens, the others pad the matrix and are cut.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    dense: Tensor | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        """Check the shapes once, here."""
        if self.dense is None:
            self._check_matrix()
            columns = self.weight.shape[0]  # type: ignore[union-attr]
        else:
            if self.hidden is not None or self.weight is not None or self.bias is not None:
                raise UserError("a law has `dense` logits and a `hidden`, `weight` or `bias`", "give one or the other")
            if self.scale != 1.0 or self.softcap is not None:
                raise UserError("`scale` and `softcap` belong to `hidden` and `weight`", "apply them to the dense logits before")
            if self.dense.ndim != 2 or not self.dense.is_floating_point():
                raise UserError(f"dense logits are {self.dense.dtype} {tuple(self.dense.shape)}", "give floats (N, V): positions, tokens")
            columns = self.dense.shape[1]
        if self.vocabulary is not None and not 1 <= self.vocabulary <= columns:
            raise UserError(
                f"the vocabulary is {self.vocabulary}, the logits have {columns} columns", "use 1 to the number of columns"
            )

    def _check_matrix(self) -> None:
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden is None or weight is None:
            raise UserError("a law lacks " + ("`hidden`" if hidden is None else "`weight`"), "give both, or `dense` alone")
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise UserError(
                f"`hidden` has shape {tuple(hidden.shape)}, `weight` {tuple(weight.shape)}",
                "hidden is (N, d), weight (V, d); flatten batch and length into N",
            )
        if not hidden.is_floating_point() or not weight.is_floating_point():
            raise UserError(f"`hidden` is {hidden.dtype}, `weight` {weight.dtype}", "give tensors of floats")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise UserError(f"`bias` has shape {tuple(bias.shape)}, `weight` {tuple(weight.shape)}", "bias is (V,)")
        if hidden.device != weight.device:
            raise UserError(f"`hidden` is on {hidden.device}, `weight` on {weight.device}", "bring both to one device")
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"the softcap is {self.softcap}", "use a softcap above 0, or None for none")

    def __len__(self) -> int:
        return self._lead.shape[0]

    @property
    def _lead(self) -> Tensor:
        return self.hidden if self.dense is None else self.dense  # type: ignore[return-value]

    @property
    def width(self) -> int:
        """V, the number of tokens: columns left after the cut."""
        if self.vocabulary is not None:
            return self.vocabulary
        return self.weight.shape[0] if self.dense is None else self.dense.shape[1]  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._lead.device

    @property
    def dtype(self) -> torch.dtype:
        """What logits are computed in after the product: float32, or float64."""
        return wide(self._lead.dtype)

    def __getitem__(self, index: Rows) -> Law:
        """The law of some rows: an index, a slice, a tensor of indices or a boolean mask `(N,)`."""
        index = _rows(index, len(self))
        if self.dense is not None:
            return replace(self, dense=self.dense[index])
        return replace(self, hidden=self.hidden[index])  # type: ignore[index]

    def detach(self) -> Law:
        """The same law, through which no gradient passes."""
        tensors = {name: getattr(self, name) for name in ("hidden", "weight", "bias", "dense")}
        return replace(self, **{name: value.detach() for name, value in tensors.items() if value is not None})

    def logits(self, rows: Rows = slice(None)) -> Tensor:
        """`(n, V)` logits of some rows in float32 (float64 for float64), differentiable. All rows of a long text may not fit."""
        rows = _rows(rows, len(self))
        if self.dense is not None:
            return self.dense[rows, : self.width].to(self.dtype)
        assert self.hidden is not None and self.weight is not None
        hidden, weight = self.hidden[rows], self.weight[: self.width]
        logits = (hidden @ weight.to(hidden.dtype).t()).to(self.dtype)
        if self.bias is not None:
            logits = logits + self.bias[: self.width].to(self.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Sparse:
    """A teacher's stored top-k: the k likeliest tokens of N positions and their log-probabilities at temperature 1.

    The tail mass, 1 - sum_k exp(logs), lies on the other width - k tokens, nobody knows how.

    Args:
        ids: `(N, k)` integers, different within a row, each below `width`.
        logs: `(N, k)` log-probabilities, floats.
        width: V, the size of the vocabulary that `ids` count in.
    """

    ids: Tensor
    logs: Tensor
    width: int

    def __post_init__(self) -> None:
        """Check the shapes once, here."""
        if self.ids.ndim != 2 or self.ids.shape != self.logs.shape:
            raise UserError(f"`ids` has shape {tuple(self.ids.shape)}, `logs` {tuple(self.logs.shape)}", "both are (N, k)")
        if self.ids.is_floating_point() or self.ids.dtype is torch.bool or not self.logs.is_floating_point():
            raise UserError(f"`ids` is {self.ids.dtype}, `logs` {self.logs.dtype}", "ids are integers, logs are floats")
        if not 1 <= self.ids.shape[1] <= self.width:
            raise UserError(f"{self.ids.shape[1]} entries a row of a vocabulary of {self.width}", "k is between 1 and the width")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.logs.device

    def __getitem__(self, index: Rows) -> Sparse:
        """Some rows: an index, a slice, a tensor of indices or a boolean mask `(N,)`."""
        index = _rows(index, len(self))
        return replace(self, ids=self.ids[index], logs=self.logs[index])

    def detach(self) -> Sparse:
        """The same, through which no gradient passes."""
        return replace(self, logs=self.logs.detach())
