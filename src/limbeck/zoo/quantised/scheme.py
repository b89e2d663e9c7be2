"""How a weight is quantised: levels, groups, rounding, and the gradient through it, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import UserError, unknown

GROUPS = ("tensor", "channel")
ROUNDINGS = ("nearest", "stochastic")
BACKWARDS = ("none", "truncated", "complicated")


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a weight.

    The weight is cut into groups. Of the b values w of a group, with s levels:

        affine:     alpha = max w - min w, beta = min w; v = (w - beta) / alpha; q = round(v (s - 1)) / (s - 1); w_q = alpha q + beta
        symmetric:  alpha = max |w| / h, h = (s - 1) / 2; w_q = alpha round(w / alpha), s odd
        learned:    as affine, but q is the nearest of s learned points, ties to the upper one

    alpha = 1 where a group has one value only. Polino et al., arXiv 1802.05668, sections 2 and 4; rounding is half to even.

    Attributes:
        levels: s, 2 to 256.
        group: what shares alpha and beta: "tensor", "channel" (an output channel; of an embedding a row), or a number b: each b
            consecutive values of the flattened weight, the last group padded with the last value.
        symmetric: zero is a level, and there is no beta.
        learned: the levels are points in [0, 1] that are learned, one set a tensor.
        rounding: "nearest", or "stochastic": up with the probability of the fraction, while training.
        backward: the gradient through rounding. "none": straight through. "truncated": zero where |w| > 1, and w is clipped to
            [-1, 1] before it is quantised. "complicated": straight through the rounding, exact through the scaling.
        activations: bits of the layer's inputs, symmetric, one scale a token (of pictures a sample); None leaves them alone.
    """

    levels: int = 16
    group: str | int = "channel"
    symmetric: bool = False
    learned: bool = False
    rounding: str = "nearest"
    backward: str = "none"
    activations: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or not 2 <= self.levels <= 256:
            raise UserError(f"{self.levels} levels", "use 2 to 256 levels: 1 to 8 bits")
        if isinstance(self.group, str) and self.group not in GROUPS:
            raise unknown("group of weights", self.group, GROUPS)
        if isinstance(self.group, int) and (isinstance(self.group, bool) or self.group < 2):
            raise UserError(f"buckets of {self.group} values", "use buckets of 2 or more values, 256 is usual")
        if self.symmetric and (self.levels % 2 == 0 or self.levels < 3):
            raise UserError(
                f"{self.levels} symmetric levels", "zero and as many on either side make an odd number: 3, 7, 15, ... (2 bits and more)"
            )
        if self.symmetric and self.learned:
            raise UserError("learned points are spread between the least and the largest weight", "leave symmetric out")
        for name, value, known in (("rounding", self.rounding, ROUNDINGS), ("backward style", self.backward, BACKWARDS)):
            if value not in known:
                raise unknown(name, value, known)
        if self.activations is not None and not 2 <= self.activations <= 16:
            raise UserError(f"activations of {self.activations} bits", "use 2 to 16 bits, or None")

    @classmethod
    def of_bits(cls, bits: int, **settings: Any) -> Scheme:
        """The scheme with as many levels as `bits` bits hold: 2^bits, symmetric 2^bits - 1."""
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise UserError(f"weights of {bits} bits", "use 1 to 8 bits")
        if settings.get("symmetric") and bits < 2:
            raise UserError("symmetric weights of 1 bit", "use 2 bits or more: -1, 0 and 1 need 3 levels")
        return cls(levels=2**bits - bool(settings.get("symmetric")), **settings)

    @property
    def bits(self) -> int:
        """Bits that hold one code."""
        return math.ceil(math.log2(self.levels))

    def with_levels(self, levels: int) -> Scheme:
        """The same with other levels; of a symmetric one the next lower odd number."""
        return replace(self, levels=levels - (1 - levels % 2 if self.symmetric else 0))

    def as_dict(self) -> dict[str, Any]:
        """What a folded layer's note says: JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Scheme:
        """Back from `as_dict`.

        Raises:
            UserError: unknown or wrong entries.
        """
        try:
            return cls(**entries)
        except TypeError:
            raise UserError(f"a scheme of quantisation with the entries {', '.join(map(str, entries))}", "save the network again") from None


def to_groups(weight: Tensor, group: str | int, axis: int = 0) -> Tensor:
    """The weight as `(G, b)`: one row a group (see `Scheme`). `axis`: the output channels' axis.

    >>> to_groups(torch.arange(5.0), 2)  # the last bucket is padded with the last value
    tensor([[0., 1.],
            [2., 3.],
            [4., 4.]])
    """
    if group == "tensor":
        return weight.reshape(1, -1)
    if group == "channel":
        return weight.movedim(axis, 0).reshape(weight.shape[axis], -1)
    flat, size = weight.reshape(-1), min(int(group), weight.numel())
    missing = -len(flat) % size
    return (torch.cat([flat, flat[-1:].expand(missing)]) if missing else flat).reshape(-1, size)


def from_groups(groups: Tensor, shape: tuple[int, ...], group: str | int, axis: int = 0) -> Tensor:
    """The inverse of `to_groups`; padding is dropped."""
    if group == "tensor":
        return groups.reshape(shape)
    if group == "channel":
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return groups.reshape(moved).movedim(0, axis)
    return groups.reshape(-1)[: math.prod(shape)].reshape(shape)


def group_shape(shape: tuple[int, ...], group: str | int, axis: int = 0) -> tuple[int, int]:
    """(G, b) of a weight of that shape."""
    numel = math.prod(shape)
    if group == "tensor":
        return 1, numel
    if group == "channel":
        return shape[axis], numel // shape[axis]
    size = min(int(group), numel)
    return -(-numel // size), size
