"""How many rows of logits stand in memory at a time, and how they get there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses.vocabulary.law import LOWEST, Law

BUFFER = 64 * 2**20
BLOCK = 2**20
"""Elements that a pass over logits touches at a time on a CPU: 4 MiB in float32, so that the passes of one loss meet them in the cache."""


def chunk_rows(V: int, N: int, free_memory: int | None = None) -> int:
    """Rows a chunk: as many as make one buffer of float32 logits 64 MiB, the chunks of equal length.

    On a CPU (V = 32768 and 151936, widths 256 and 512, one core) a step takes 1.5 times as long with 32 rows and 1.2 times with 64 as with
    128 and more, where the matrix products no longer gain; 64 MiB is 512 and 110 rows there. Two buffers, the student's and the teacher's,
    then stay small beside the gradient of an output matrix. An accelerator's products want more rows: with `free_memory` known a buffer
    takes a sixteenth of it, but no more than 512 MiB.

    Args:
        V: width of the vocabulary.
        N: rows in all.
        free_memory: bytes that are free, if known.
    """
    if V < 1 or N < 0:
        raise UserError(f"a vocabulary of {V} tokens and {N} rows", "use at least one token and no fewer than zero rows")
    budget = BUFFER if free_memory is None else min(free_memory // 16, 8 * BUFFER)
    rows = max(1, budget // (4 * V))
    if rows >= N:
        return max(1, N)
    return -(-N // -(-N // rows))


def chosen(chunk: int | None, law: Law) -> int:
    """The caller's chunk, or `chunk_rows` for this law on its device.

    On CUDA a quarter of the device's memory is taken for free: what is free at the moment would make the bits of a run depend on it.
    """
    if chunk is None:
        free = torch.cuda.get_device_properties(law.device).total_memory // 4 if law.device.type == "cuda" else None
        return chunk_rows(law.width, len(law), free)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk is {chunk!r}", "use a number of rows, 1 or more, or None to have it chosen")
    return chunk


def spans(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` rows that cover `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def block_rows(law_width: int, device: torch.device) -> int:
    """Rows that a loss treats at a time inside a chunk; on an accelerator always the whole chunk."""
    return max(1, BLOCK // law_width) if device.type == "cpu" else 2**31


class Reader:
    """Fills one buffer with raw logits of a law, chunk by chunk, without gradient.

    Raw: the product alone; bias, scale, softcap and temperature come with `finish`, block by block.

    Args:
        law: whose logits.
        rows: the largest chunk.
        temperature: T, a number, a scalar tensor, or `(N,)`.
    """

    def __init__(self, law: Law, rows: int, temperature: float | Tensor = 1.0) -> None:
        self.law = law
        self.temperature = temperature.to(law.dtype) if isinstance(temperature, Tensor) else temperature
        self.buffer = torch.empty(min(rows, len(law)), law.width, dtype=law.dtype, device=law.device)
        if law.dense is None:
            assert law.hidden is not None and law.weight is not None
            self.hidden = law.hidden.detach()
            self.weight = law.weight.detach()[: law.width].to(self.hidden.dtype)
            self.bias = None if law.bias is None else law.bias.detach()[: law.width].to(law.dtype).clamp(min=LOWEST)
            self.exact = self.hidden.dtype is law.dtype
            self.half = None if self.exact else torch.empty_like(self.buffer, dtype=self.hidden.dtype)

    def inverse(self, rows: slice) -> float | Tensor:
        """1 / T for these rows, ready to multiply `(n, V)`."""
        if isinstance(self.temperature, Tensor):
            return 1.0 / (self.temperature[rows].unsqueeze(1) if self.temperature.ndim else self.temperature)
        return 1.0 / self.temperature

    def __call__(self, rows: slice) -> Tensor:
        """The buffer's first rows, holding logits: `finish` must follow."""
        out = self.buffer[: rows.stop - rows.start]
        if self.law.dense is not None:
            return out.copy_(self.law.dense.detach()[rows, : self.law.width])
        if self.exact:
            return torch.mm(self.hidden[rows], self.weight.t(), out=out)
        half = self.half[: len(out)]  # type: ignore[index]
        torch.mm(self.hidden[rows], self.weight.t(), out=half)
        return out.copy_(half)

    def finish(self, block: Tensor, rows: slice, slope: bool = False) -> Tensor | None:
        """Bias, scale, softcap and temperature, in place, on the block of rows `rows`; with `slope`, d(softcapped)/d(raw), if not one."""
        law, inverse = self.law, self.inverse(rows)
        if law.dense is not None:
            block.clamp_(min=LOWEST)
        elif self.bias is not None:
            block.add_(self.bias)
        if law.softcap is None:
            factor = inverse * law.scale
            if isinstance(factor, Tensor) or factor != 1.0:
                block.mul_(factor)
            return None
        block.mul_(law.scale / law.softcap).tanh_()
        derivative = 1 - block * block if slope else None
        block.mul_(law.softcap * inverse)
        return derivative
