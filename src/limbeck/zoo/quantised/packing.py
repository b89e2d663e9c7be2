"""Codes of 1 to 8 bits in bytes, without a gap: eight codes of b bits take b bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that hold `count` codes of `bits` bits."""
    return -(-count // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, uint8, below 2^bits) as `(packed_bytes,)` uint8; code i of eight stands at bits b i to b i + b - 1.

    >>> pack(torch.tensor([1, 2, 3, 0, 0, 0, 0, 0], dtype=torch.uint8), 2)
    tensor([57,  0], dtype=torch.uint8)
    """
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        rest = -len(flat) % 8
        return torch.cat([flat, flat.new_zeros(rest)]) if rest else flat.clone()
    rest = -len(flat) % 8
    rows = torch.cat([flat, flat.new_zeros(rest)]).reshape(-1, 8).long()
    words = (rows << (torch.arange(8, device=rows.device) * bits)).sum(1, keepdim=True)
    return ((words >> (torch.arange(bits, device=rows.device) * 8)) & 255).to(torch.uint8).reshape(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, `(count,)` uint8.

    >>> unpack(torch.tensor([57, 0], dtype=torch.uint8), 2, 4).tolist()
    [1, 2, 3, 0]
    """
    if bits == 8:
        return packed[:count]
    rows = packed.reshape(-1, bits).long()
    words = (rows << (torch.arange(bits, device=rows.device) * 8)).sum(1, keepdim=True)
    codes = (words >> (torch.arange(8, device=rows.device) * bits)) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(-1)[:count]
