"""One autograd function for all losses over chunks of rows: value and gradient are made in the forward pass, the logits are dropped.

For each chunk: logits of both sides into two buffers, the loss's kernel block by block, which leaves the gradient in the student's buffer,
and three products: hidden rows, a running sum for the output matrix, one for the bias. The backward pass multiplies by the incoming
scalar. With one value a row (reduction "none") the forward pass keeps values only and the backward pass computes the chunks again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses.vocabulary.chunks import Reader, block_rows, chosen, spans
from limbeck.losses.vocabulary.law import Law, Sparse
from limbeck.losses.vocabulary.sparse import buckets

Kernel = Callable[..., Tensor]
Gradients = dict[str, Tensor]
PARTS = ("hidden", "weight", "bias", "dense")


@dataclass(frozen=True)
class Plan:
    """What is computed: everything but the student's tensors.

    Args:
        kernel: `(z, other, slope, **shape)` for a dense teacher; `(z, ids, u, slope, **shape)` for a sparse one; `(z, slope, **shape)`.
        teacher: the other side, if there is one.
        temperature: T of both sides.
        by_row: tensors `(N,)` that the kernel is given the rows of.
        shape: further numbers of the kernel.
        chunk: rows at a time.
    """

    kernel: Kernel
    teacher: Law | Sparse | None = None
    temperature: float | Tensor = 1.0
    by_row: dict[str, Tensor] = field(default_factory=dict)
    shape: dict[str, float | Tensor] = field(default_factory=dict)
    chunk: int | None = None


class _Sums:
    """The gradients on their way: rows of `hidden` or `dense` are set, `weight` and `bias` are added to."""

    def __init__(self, law: Law, needs: tuple[bool, ...]) -> None:
        wide = law.dtype
        tensors = {name: getattr(law, name) for name, need in zip(PARTS, needs) if need}
        self.law = law
        self.wanted = bool(tensors)
        self.made: Gradients = {}
        for name, tensor in tensors.items():
            whole = name in ("hidden", "dense")
            made = (torch.empty_like if name == "hidden" else torch.zeros_like)(tensor, dtype=tensor.dtype if whole else wide)
            self.made[name] = made.contiguous()

    def add(self, gradient: Tensor, rows: slice, factor: Tensor, reader: Reader) -> None:
        """`gradient` (n, V) in the raw logits, each row still to be multiplied by `factor` (n, 1)."""
        made, width = self.made, self.law.width
        if "dense" in made:
            torch.mul(gradient, factor, out=gradient)
            made["dense"][rows, :width] = gradient
            return
        if "bias" in made:
            made["bias"][:width].addmv_(gradient.t(), factor.squeeze(1))
        dtype = reader.hidden.dtype
        low = dtype is not gradient.dtype
        if low:
            gradient = reader.half[: len(gradient)].copy_(gradient.mul_(factor))  # type: ignore[index]
        if "weight" in made:
            hidden = reader.hidden[rows]
            if low:
                made["weight"][:width].add_(gradient.t() @ hidden)
            else:
                made["weight"][:width].addmm_(gradient.t(), hidden * factor)
        if "hidden" in made:
            back = gradient @ reader.weight
            made["hidden"][rows] = back if low else back.mul_(factor)

    def finished(self) -> Gradients:
        """Each gradient in the dtype of its tensor."""
        return {name: made.to(getattr(self.law, name).dtype) for name, made in self.made.items()}


def compute(law: Law, plan: Plan, needs: tuple[bool, ...], coefficient: Tensor | None = None) -> tuple[Tensor, Gradients]:
    """Values `(N,)` and, where `needs` says so, the gradients of sum_n coefficient_n * value_n. No graph is recorded."""
    size = chosen(plan.chunk, law)
    values = torch.empty(len(law), dtype=law.dtype, device=law.device)
    sums = _Sums(law, needs)
    if not len(law):
        return values, sums.finished()
    student = Reader(law, size, plan.temperature)
    teacher = Reader(plan.teacher, size, plan.temperature) if isinstance(plan.teacher, Law) else None
    step = block_rows(law.width, law.device)
    for rows in spans(len(law), size):
        z = student(rows)
        u = teacher(rows) if teacher is not None else None
        for part in spans(len(z), step):
            here = slice(rows.start + part.start, rows.start + part.stop)
            curve = student.finish(z[part], here, slope=sums.wanted)
            values[here] = _kernel(plan, teacher, z[part], None if u is None else u[part], here, sums.wanted)
            if curve is not None:
                z[part].mul_(curve)
        if sums.wanted:
            inverse = student.inverse(rows) * law.scale
            factor = inverse * (torch.ones_like(values[rows]) if coefficient is None else coefficient[rows]).unsqueeze(1)
            sums.add(z, rows, factor.to(law.dtype), student)
    return values, sums.finished()


def _kernel(plan: Plan, teacher: Reader | None, z: Tensor, u: Tensor | None, rows: slice, slope: bool) -> Tensor:
    """Call the kernel with what it takes."""
    shape = {**plan.shape, **{name: tensor[rows] for name, tensor in plan.by_row.items()}}
    if teacher is not None and u is not None:
        teacher.finish(u, rows)
        return plan.kernel(z, u if u.dtype is z.dtype else u.to(z.dtype), slope, **shape)
    if isinstance(plan.teacher, Sparse):
        inverse = 1.0 / plan.temperature
        if isinstance(inverse, Tensor) and inverse.ndim:
            inverse = inverse[rows].unsqueeze(1)
        ids, logs = buckets(plan.teacher, rows, inverse, z.dtype)
        return plan.kernel(z, ids, logs, slope, **shape)
    return plan.kernel(z, slope=slope, **shape)


class _Once(torch.autograd.Function):
    """Stands behind the gradients when a graph of them is asked for: a second derivative is refused in words."""

    @staticmethod
    def forward(ctx, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override, no-untyped-def]
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx, *incoming: Tensor) -> tuple[None, ...]:  # type: ignore[override, no-untyped-def]
        raise UserError(
            "the chunked losses over a vocabulary have no second derivative",
            "form the loss from `law.logits()` with limbeck.losses for one, or drop create_graph=True",
        )


class _Loss(torch.autograd.Function):
    """`(plan, law, scalar, row_weight, hidden, weight, bias, dense)` -> sum of weight * value, or with `scalar` false one a row."""

    @staticmethod
    def forward(ctx, plan: Plan, law: Law, scalar: bool, row_weight, *tensors):  # type: ignore[override, no-untyped-def]
        needs = ctx.needs_input_grad[4:]
        bare = law.detach()
        ctx.plan, ctx.scalar, ctx.law = plan, scalar, None
        keep = scalar and any(needs)
        with torch.autocast(law.device.type, enabled=False):
            values, gradients = compute(bare, plan, needs if keep else (False,) * 4, row_weight)
        result = values if row_weight is None else values * row_weight
        ctx.values = values if ctx.needs_input_grad[3] else None
        ctx.anchor = next(i for i, need in enumerate(needs) if need) if any(needs) else None
        if scalar:
            ctx.gradients = gradients
            ctx.save_for_backward(row_weight, *(t if i == ctx.anchor else None for i, t in enumerate(tensors)))
            return result.sum()
        ctx.law = bare
        ctx.save_for_backward(row_weight, *tensors)
        return result

    @staticmethod
    def backward(ctx, incoming: Tensor):  # type: ignore[override, no-untyped-def]
        row_weight, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        with torch.no_grad(), torch.autocast(incoming.device.type, enabled=False):
            if ctx.scalar:
                made = {name: gradient * incoming for name, gradient in ctx.gradients.items()}
            else:
                _, made = compute(ctx.law, ctx.plan, needs, incoming if row_weight is None else incoming * row_weight)
            for_weight = None if ctx.values is None else ctx.values * incoming
        if torch.is_grad_enabled() and made:
            made = dict(zip(made, _Once.apply(tensors[ctx.anchor], *made.values())))
        return (None, None, None, for_weight, *(made.get(name) for name in PARTS))


def scored(
    law: Law, plan: Plan, weight: Tensor | None, reduction: str, total: float | Tensor | None, factor: float | Tensor = 1.0
) -> Tensor:
    """The loss: `factor` times the mean (sum over `total`, default N), the sum, or each row's weight * value.

    An empty law gives zero, still in the graph; so does a total of 0.
    """
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"unknown reduction {reduction!r}", "use 'mean', 'sum' or 'none'")
    if total is not None and reduction != "mean":
        raise UserError(f"`total` divides a mean, the reduction is {reduction!r}", "drop `total`, or use reduction='mean'")
    if weight is not None:
        if weight.shape != (len(law),):
            raise UserError(f"the weight has shape {tuple(weight.shape)}, the law {len(law)} rows", "give one weight a row: (N,)")
        weight = weight.to(law.dtype)
    result = _Loss.apply(plan, law, reduction != "none", weight, *(getattr(law, name) for name in PARTS))
    if reduction == "mean":
        factor = factor / _divisor(total, len(law))
    return result if isinstance(factor, float) and factor == 1.0 else result * factor


def _divisor(total: float | Tensor | None, rows: int) -> float | Tensor:
    """What a mean divides by; 0 becomes 1, since nothing is scored then."""
    if total is None:
        return max(rows, 1)
    if isinstance(total, Tensor):
        if total.ndim:
            raise UserError(f"`total` has shape {tuple(total.shape)}", "give one number: the count of scored positions")
        return torch.where(total == 0, torch.ones_like(total), total)
    if total < 0:
        raise UserError(f"`total` is {total}", "give the count of scored positions of the whole batch")
    return total or 1
