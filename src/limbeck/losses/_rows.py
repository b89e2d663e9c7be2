"""What every loss does around its equation: check shapes, widen the dtype, apply a temperature, hide rows, reduce.

Legend: `C` is the last axis (classes or features); every axis before it together makes the *rows*.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import UserError

Reduction = Literal["mean", "sum", "none"]


def wide(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 when they came in float64."""
    return x if x.dtype is torch.float32 or x.dtype is torch.float64 else x.float()


def unit(x: Tensor, dim: int = -1, least: float | Tensor = 1e-12) -> Tensor:
    """Vectors along `dim` scaled to length 1; those shorter than `least` have no direction and are divided by 1.

    So a vector of zeros (dead units, a fresh head) gets a gradient of ordinary size, where division by a tiny length would make it explode.
    """
    length = x.norm(dim=dim, keepdim=True)
    return x / length.masked_fill(length < least, 1)


def check_same(student: Tensor, teacher: Tensor, what: str = "logits") -> None:
    """Both tensors must have one shape; the error names both."""
    if student.shape != teacher.shape:
        raise UserError(
            f"the student's {what} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            "bring both to one shape first: same batch, same classes or features in the same order",
        )


def check_rows(rows: torch.Size, given: Tensor, what: str) -> None:
    """A mask, a weight or labels must have one entry a row; the error names both shapes."""
    if given.shape != rows:
        raise UserError(
            f"the {what} has shape {tuple(given.shape)}, the rows have shape {tuple(rows)}",
            f"give one {what} entry for each row: all axes of the input but the last",
        )


def check_positive(value: float | Tensor, what: str = "temperature") -> None:
    """A number must be above zero. A tensor is taken on trust: looking into it would wait for the device."""
    if not isinstance(value, Tensor) and not value > 0:
        raise UserError(f"the {what} is {value}", f"use a {what} above 0")


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """`wide(logits) / temperature`; a temperature tensor is a scalar or has one entry a row."""
    logits = wide(logits)
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            check_rows(logits.shape[:-1], temperature, "temperature")
            return logits / temperature.unsqueeze(-1)
        return logits / temperature
    if not temperature > 0:
        check_positive(temperature)
    return logits if temperature == 1 else logits / temperature


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros in the hidden rows, so that whatever was padded there (even NaN) reaches neither value nor gradient."""
    if mask is None:
        return x
    check_rows(x.shape[:-1], mask, "mask")
    return x.masked_fill(~mask.bool().unsqueeze(-1), 0)


def reduce_rows(rows: Tensor, mask: Tensor | None = None, weight: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """From one value a row to the result.

    mean = sum over scored rows of weight * value / number of scored rows; zero, still in the graph, when no row is scored.

    Args:
        rows: `(...)` one value a row.
        mask: `(...)` true where a row is scored.
        weight: `(...)` a factor a row; it does not enter the count, so halving all weights halves the mean.
        reduction: "mean", "sum", or "none" for one value a row (zero in the hidden ones).
    """
    if mask is not None:
        check_rows(rows.shape, mask, "mask")
        mask = mask.bool()
        rows = rows.masked_fill(~mask, 0)
    if weight is not None:
        check_rows(rows.shape, weight, "weight")
        rows = rows * weight.to(rows.dtype)
    if reduction == "mean":
        if mask is None:
            return rows.mean() if rows.numel() else rows.sum()
        return rows.sum() / mask.sum().clamp(min=1)
    if reduction == "sum":
        return rows.sum()
    if reduction == "none":
        return rows
    raise UserError(f"unknown reduction {reduction!r}", "use 'mean', 'sum' or 'none'")
