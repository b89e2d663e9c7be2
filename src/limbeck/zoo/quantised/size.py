"""What a quantised network takes: bytes of codes and scales, mean bits, Huffman code lengths; and who gets how many levels."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.zoo.quantised.fake import channel_axis, fake_of
from limbeck.zoo.quantised.packed import CodedWeight


@dataclass(frozen=True)
class Size:
    """What a folded network takes, in bytes as they are saved (safetensors' header left out).

    Attributes:
        codes: packed codes.
        scales: scales, offsets and learned points.
        rest: parameters and buffers that are not quantised.
        weights: how many weights are held as codes.
        bits: (codes + scales) * 8 / weights: mean bits of a quantised weight, its share of the scales included.
        huffman_bits: mean code length of the codes if each tensor's codes had a Huffman code of their own (nothing is stored so).
    """

    codes: int
    scales: int
    rest: int
    weights: int
    bits: float
    huffman_bits: float

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.scales + self.rest


def size_of(network: nn.Module) -> Size:
    """Count a folded network; weights that are shared count once."""
    coded = [m for m in network.modules() if isinstance(m, CodedWeight)]
    own = {id(buffer) for m in coded for buffer in m.buffers()}
    codes = sum(m.codes.numel() for m in coded)
    scales = sum(b.numel() * b.element_size() for m in coded for name, b in m.named_buffers() if name != "codes")
    rest = {
        tensor.data_ptr() or id(tensor): tensor.numel() * tensor.element_size()
        for tensor in network.state_dict(keep_vars=True).values()
        if isinstance(tensor, Tensor) and id(tensor) not in own
    }
    weights = sum(m.coded_weights for m in coded)
    lengths = sum(huffman_length(used_counts(m)) * m.coded_weights for m in coded)
    each = max(weights, 1)
    return Size(codes, scales, sum(rest.values()), weights, (codes + scales) * 8 / each, lengths / each)


def used_counts(coded: CodedWeight) -> list[int]:
    """How often each code stands for a weight (padding left out)."""
    numbers = coded.numbers().flatten()[: coded.coded_weights]
    return torch.bincount(numbers.long(), minlength=coded.scheme.levels).tolist()


def huffman_length(counts: Sequence[int]) -> float:
    """Mean bits a symbol of the Huffman code for these counts; 0 where only one symbol occurs.

    >>> huffman_length([2, 1, 1])
    1.5
    """
    queue = [count for count in counts if count]
    total, bits = sum(queue), 0
    heapq.heapify(queue)
    while len(queue) > 1:
        joined = heapq.heappop(queue) + heapq.heappop(queue)
        bits += joined
        heapq.heappush(queue, joined)
    return bits / total if total else 0.0


def compute_bits(network: nn.Module, inputs: Any) -> float:
    """Sum over matrix layers and convolutions of multiply-adds * bits of a weight * bits of an input, for one sample.

    What is not quantised counts 32 bits; products inside attention are left out. From "Dissecting Bit-Level Scaling Laws in Quantizing
    Vision Generative Models" (arXiv 2501.06218).

    Args:
        network: fake-quantised, folded or plain.
        inputs: a tensor `(B, ...)` for `network(x)`, or a mapping of such for `network(**x)`.
    """
    total = 0.0

    def count(layer: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        quantiser = getattr(layer, "coded", None) or fake_of(layer)
        scheme = None if quantiser is None else quantiser.scheme
        weight = layer.weight
        fan_in = weight.numel() // weight.shape[channel_axis(layer) or 0]
        a_bits = 32 if scheme is None or scheme.activations is None else scheme.activations
        total += output.numel() / len(output) * fan_in * (32 if scheme is None else scheme.bits) * a_bits

    layers = [m for m in network.modules() if channel_axis(m) is not None and not isinstance(m, nn.Embedding)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad():
            network.eval()
            network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return total


def share_levels(norms: Mapping[str, float], levels: int) -> dict[str, int]:
    """Levels for each tensor by its gradient's norm: s_i = s / 2 + round(share_i * total / 2), total = s times the tensors.

    Half of the levels are spread evenly, half by the share of the gradient's norm; the total is kept by a correction of the largest
    (smallest) entry. At least 2 and at most 256. Polino et al., arXiv 1802.05668, section 4.

    >>> share_levels({"a": 3.0, "b": 1.0}, 8)
    {'a': 10, 'b': 6}
    """
    total, whole = levels * len(norms), sum(norms.values())
    even = {name: 1 / len(norms) for name in norms}
    shares = even if whole <= 0 else {name: norm / whole for name, norm in norms.items()}
    found = {name: levels // 2 + round(share * total / 2) for name, share in shares.items()}
    found = {name: min(max(count, 2), 256) for name, count in found.items()}
    while (excess := sum(found.values()) - total) != 0:
        movable = {name: count for name, count in found.items() if (count > 2 if excess > 0 else count < 256)}
        if not movable:
            break
        name = max(movable, key=movable.__getitem__) if excess > 0 else min(movable, key=movable.__getitem__)
        found[name] += -1 if excess > 0 else 1
    return found


def describe(network: nn.Module) -> dict[str, Any]:
    """The size of a folded network as plain figures, for summaries."""
    size = size_of(network)
    return {"bits": size.bits, "huffman_bits": size.huffman_bits, "code_bytes": size.codes, "scale_bytes": size.scales}
