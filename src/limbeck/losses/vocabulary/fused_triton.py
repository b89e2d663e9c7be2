"""Triton kernels of four divergences: one pass over a chunk's logits for the log-normalisers, one or two for value and gradient.

Imported only when tensors are on an accelerator and triton is there (`divergence.py`). A program works on one row, a block of columns at
a time; logits come in tempered, float32, and the student's are overwritten by the gradient. The formulas are those of `dense.py`,
with which they agree in triton's interpreter; a test compares the two on CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD, REVERSE, JS, TV = 0, 1, 2, 3
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _log_normaliser(row, width, BLOCK: tl.constexpr):
    """The largest logit of a row and the logarithm of the sum of exponentials below it."""
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row + columns, mask=columns < width, other=float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    return top, tl.log(total)


@triton.jit
def _terms(log_s, log_t, beta, KIND: tl.constexpr):
    """(value, g) entry by entry, g = d(value)/d(log s) up to what vanishes in g - s sum(g)."""
    s = tl.exp(log_s)
    t = tl.exp(log_t)
    if KIND == 0:
        value = t * (log_t - log_s)
        g = -t
    elif KIND == 1:
        value = s * (log_s - log_t)
        g = value
    elif KIND == 2:
        log_m = tl.log(tl.maximum(beta * t + (1 - beta) * s, TINY))
        own = s * (log_s - log_m)
        value = beta * t * (log_t - log_m) + (1 - beta) * own
        g = (1 - beta) * own
    else:
        value = 0.5 * tl.abs(s - t)
        g = 0.5 * tl.where(s > t, s, tl.where(s < t, -s, 0.0))
    return s, value, g


@triton.jit
def _divergence(student, teacher, values, width, stride, beta, KIND: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: log-normalisers, then value and sum of g, then the gradient g - s sum(g) over the student's logits."""
    place = tl.program_id(0)
    row_s = student + place.to(tl.int64) * stride
    row_t = teacher + place.to(tl.int64) * stride
    top_s, log_s_total = _log_normaliser(row_s, width, BLOCK)
    top_t, log_t_total = _log_normaliser(row_t, width, BLOCK)
    value = tl.zeros((), tl.float32)
    pull = tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        log_s = tl.load(row_s + columns, mask=inside, other=0.0) - top_s - log_s_total
        log_t = tl.load(row_t + columns, mask=inside, other=0.0) - top_t - log_t_total
        s, part, g = _terms(log_s, log_t, beta, KIND)
        value += tl.sum(tl.where(inside, part, 0.0), 0)
        pull += tl.sum(tl.where(inside, g, 0.0), 0)
        if SLOPE and KIND == 0:  # sum(g) is known beforehand: -1
            tl.store(row_s + columns, s + g, mask=inside)
    tl.store(values + place, value)
    if SLOPE and KIND != 0:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            log_s = tl.load(row_s + columns, mask=inside, other=0.0) - top_s - log_s_total
            log_t = tl.load(row_t + columns, mask=inside, other=0.0) - top_t - log_t_total
            s, part, g = _terms(log_s, log_t, beta, KIND)
            tl.store(row_s + columns, g - s * pull, mask=inside)


def _launch(kind: int, z: Tensor, u: Tensor, slope: bool, beta: float = 0.5) -> Tensor:
    """Values `(n,)`; z `(n, V)` then holds the gradient. Both are float32 and contiguous."""
    values = torch.empty(len(z), dtype=torch.float32, device=z.device)
    if len(z):
        block = min(8192, triton.next_power_of_2(z.shape[1]))
        warps = 16 if block >= 8192 else 8
        with torch.cuda.device_of(z):
            _divergence[(len(z),)](z, u, values, z.shape[1], z.stride(0), beta, KIND=kind, SLOPE=slope, BLOCK=block, num_warps=warps)
    return values


def forward(z: Tensor, u: Tensor, slope: bool) -> Tensor:
    """As `dense.forward`."""
    return _launch(FORWARD, z, u, slope)


def reverse(z: Tensor, u: Tensor, slope: bool) -> Tensor:
    """As `dense.reverse`."""
    return _launch(REVERSE, z, u, slope)


def js(z: Tensor, u: Tensor, slope: bool, beta: float = 0.5) -> Tensor:
    """As `dense.js`."""
    return _launch({0: FORWARD, 1: REVERSE}.get(beta, JS), z, u, slope, beta)  # type: ignore[call-overload]


def total_variation(z: Tensor, u: Tensor, slope: bool) -> Tensor:
    """As `dense.total_variation`."""
    return _launch(TV, z, u, slope)


KERNELS = {"forward": forward, "reverse": reverse, "js": js, "tv": total_variation}
