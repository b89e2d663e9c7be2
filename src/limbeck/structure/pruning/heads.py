"""Attention heads as units that can be removed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.structure.pruning.groups import Group, Slice

_COUNTS = ("heads", "num_heads", "num_attention_heads", "n_heads")
_FUSED = ("qkv", "in_proj", "to_qkv")
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"))
_OUT = ("project", "proj", "out_proj", "o_proj", "to_out", "out")


def head_groups(network: nn.Module) -> list[Group]:
    """A group for every attention module that keeps a number of heads, projections of queries, keys and values, and one back.

    Known are one joint projection (rows in the order q, k, v; head by head) and three separate ones, under their usual names. Whether the
    forward pass really takes fewer heads is tried by `find_groups`.
    """
    found = []
    for path, module in network.named_modules():
        count = next((name for name in _COUNTS if isinstance(getattr(module, name, None), int)), None)
        out = next((name for name in _OUT if isinstance(getattr(module, name, None), nn.Linear)), None)
        if count is None or out is None:
            continue
        heads, width = getattr(module, count), getattr(module, out).in_features
        if heads < 1 or width % heads:
            continue
        made = _projections(module, width)
        if made:
            found.append(_group(path, count, heads, width // heads, made, out, module))
    return found


def _projections(module: nn.Module, width: int) -> dict[str, int]:
    """The layers that make queries, keys and values, and how many of the three each makes."""
    for name in _FUSED:
        layer = getattr(module, name, None)
        if isinstance(layer, nn.Linear) and layer.out_features == 3 * width:
            return {name: 3}
    for names in _SEPARATE:
        layers = [getattr(module, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) and layer.out_features == width for layer in layers):
            return dict.fromkeys(names, 1)
    return {}


def _group(path: str, count: str, heads: int, size: int, made: dict[str, int], out: str, module: nn.Module) -> Group:
    rows = torch.arange(heads * size).view(heads, size)
    slices: list[Slice] = []
    numbers = [(path, count, 1)]

    def inside(name: str) -> str:
        return f"{path}.{name}" if path else name

    for name, times in made.items():
        index: Tensor = torch.cat([rows + part * heads * size for part in range(times)], 1)
        layer = getattr(module, name)
        slices += [Slice(inside(name), tensor, 0, index) for tensor in ("weight", "bias") if getattr(layer, tensor) is not None]
        numbers.append((inside(name), "out_features", size * times))
    slices.append(Slice(inside(out), "weight", 1, rows, enters=True))
    numbers.append((inside(out), "in_features", size))
    for name in ("embed_dim", "all_head_size", "inner_dim", "attn_dim"):
        if getattr(module, name, None) == heads * size:
            numbers.append((path, name, size))
    return Group(path, "heads", heads, tuple(slices), tuple(numbers))
