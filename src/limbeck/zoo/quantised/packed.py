"""Quantised networks as they are shipped: codes in bytes, scales, levels; saved as such and opened again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.errors import UserError
from limbeck.zoo.quantised.fake import FakeQuantised, channel_axis, fakes, full_weight, quantise_inputs
from limbeck.zoo.quantised.grid import decode, encode
from limbeck.zoo.quantised.origin import origin_of
from limbeck.zoo.quantised.packing import pack, packed_bytes, unpack
from limbeck.zoo.quantised.scheme import Scheme, from_groups, group_shape, to_groups

REFERENCE = "quantised:network"


class CodedWeight(nn.Module):
    """A weight held as packed codes, scales and perhaps offsets and points; `forward()` gives the weight.

    Args:
        scheme: how it was quantised.
        shape: of the weight.
        axis: of the output channels.
        dtype: of the scales and of the weight that is given.

    Attributes:
        codes: `(bytes,)` uint8. scale, offset: `(G, 1)`; offset None where the scheme is symmetric. points: `(s,)`, or None.
        coded_weights: how many weights there are.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    points: Tensor | None

    def __init__(self, scheme: Scheme, shape: tuple[int, ...], axis: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scheme, self.shape, self.axis = scheme, tuple(shape), axis
        groups, size = group_shape(self.shape, scheme.group, axis)
        self.groups, self.coded_weights = (groups, size), int(torch.Size(shape).numel())
        self.register_buffer("codes", torch.zeros(packed_bytes(groups * size, scheme.bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(groups, 1, dtype=dtype))
        self.register_buffer("offset", None if scheme.symmetric else torch.zeros(groups, 1, dtype=dtype))
        self.register_buffer("points", torch.zeros(scheme.levels, dtype=dtype) if scheme.learned else None)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, quantiser: FakeQuantised) -> CodedWeight:
        """From a full-precision weight and its quantiser; values are rounded to the nearest level."""
        scheme, points = quantiser.scheme, quantiser.levels()
        made = cls(scheme, tuple(weight.shape), quantiser.axis, weight.dtype).to(weight.device)
        codes, scale, offset = encode(to_groups(weight, scheme.group, quantiser.axis), scheme, points, quantiser.clip)
        made.codes, made.scale, made.offset = pack(codes, scheme.bits), scale.clone(), None if offset is None else offset.clone()
        made.points = None if points is None else points.detach().clone()
        return made

    def numbers(self) -> Tensor:
        """The codes `(G, b)`, uint8."""
        groups, size = self.groups
        return unpack(self.codes, self.scheme.bits, groups * size).reshape(groups, size)

    def forward(self) -> Tensor:
        """The weight, in its shape."""
        weight = decode(self.numbers(), self.scale, self.offset, self.scheme, self.points)
        return from_groups(weight, self.shape, self.scheme.group, self.axis)


class _Coded:
    """Mixed into a layer's class: its weight is read from codes."""

    @property
    def weight(self) -> Tensor:
        """Dequantised at each reading."""
        return self.coded()  # type: ignore[attr-defined]


_classes: dict[type, type] = {}


def _to_coded(layer: nn.Module, coded: CodedWeight) -> None:
    """Let a plain layer hold its weight as codes; its class becomes one that inherits from its own."""
    kind = type(layer)
    layer._parameters.pop("weight", None)
    layer.__class__ = _classes.setdefault(kind, type(f"Coded{kind.__name__}", (_Coded, kind), {"__module__": __name__}))
    layer.coded = coded


def coded_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer whose weight is held as codes."""
    for name, layer in network.named_modules():
        if isinstance(layer, _Coded):
            yield name, layer


def is_coded(network: nn.Module) -> bool:
    """Whether any layer holds its weight as codes."""
    return any(True for _ in coded_layers(network))


def fold(network: nn.Module) -> nn.Module:
    """Make a fake-quantised network hold nothing but codes where it is quantised, in place; its outputs stay, to the bit.

    It can be measured, saved, exported, and be a teacher; its coded weights do not train (`unfold` gives plain layers back).

    Raises:
        UserError: nothing in it is quantised.
    """
    made_from = origin_of(network)
    found = list(fakes(network))
    if not found:
        raise UserError(f"{type(network).__name__} has no quantised layer to fold", "quantise it first")
    notes: dict[str, dict[str, Any]] = {}
    shared: dict[int, tuple[str, CodedWeight]] = {}
    for name, layer, quantiser in found:
        weight = full_weight(layer)
        first, coded = shared.setdefault(id(weight), (name, CodedWeight.of(weight, quantiser)))
        notes[name] = quantiser.scheme.as_dict() if first == name else {"same_as": first}
        # not torch's remove_parametrizations: it takes the weight away from the class, which copies of the network share
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        _to_coded(layer, coded)
    _remember(network, {"ref": REFERENCE, "args": {"of": made_from, "layers": notes}})
    return network


def _remember(network: nn.Module, config: dict[str, Any] | None) -> None:
    """Set `limbeck_config`, also where the class computes its own."""
    if isinstance(getattr(type(network), "limbeck_config", None), property):
        kind = type(network)
        network.__class__ = type(kind.__name__, (kind,), {"limbeck_config": None, "__module__": kind.__module__})
    network.limbeck_config = config  # type: ignore[assignment]


def rebuild_quantised(of: Any, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A folded network with blank codes, for `load_model`.

    Args:
        of: `{"ref", "args"}` of the network that was quantised.
        layers: each folded layer's scheme, or `{"same_as": another layer}`.

    Raises:
        UserError: the network has no such layers, or limbeck did not make it.
    """
    from limbeck.zoo.build import build

    if not isinstance(of, Mapping) or not isinstance(of.get("ref"), str):
        raise UserError(
            "a network that was quantised from a Python object cannot be made again by limbeck alone",
            "give load_model(folder, model=<the network before it was quantised>)",
        )
    network = code_like(build(of["ref"], **dict(of.get("args") or {})), layers)
    _remember(network, {"ref": REFERENCE, "args": {"of": dict(of), "layers": {k: dict(v) for k, v in layers.items()}}})
    return network.train()


def code_like(network: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A plain network with blank codes in the place of some weights, in place; what is coded already stays. Arguments as above."""
    made: dict[str, CodedWeight] = {}
    for name, entries in layers.items():
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            layer = None
        if isinstance(layer, _Coded):
            made[name] = layer.coded
            continue
        axis = None if layer is None else channel_axis(layer)
        if axis is None or ("same_as" in entries and entries["same_as"] not in made):
            raise UserError(f"the note says that layer {name!r} is quantised, and the network has no such layer", "save it again")
        if "same_as" in entries:
            made[name] = made[entries["same_as"]]
        else:
            weight = layer.weight
            made[name] = CodedWeight(Scheme.from_dict(entries), tuple(weight.shape), axis, weight.dtype)
        _to_coded(layer, made[name])
        quantise_inputs(layer, made[name].scheme)
    return network


def unfold(network: nn.Module) -> nn.Module:
    """Plain layers with the dequantised weights, in place: it trains again, at full size. Inputs stay quantised where they were."""
    weights: dict[int, nn.Parameter] = {}
    for _, layer in list(coded_layers(network)):
        coded: CodedWeight = layer.coded
        weight = weights.setdefault(id(coded), nn.Parameter(coded().detach().clone()))
        del layer.coded
        layer.__class__ = type(layer).__mro__[2]
        layer.register_parameter("weight", weight)
    config = getattr(network, "limbeck_config", None) or {}
    if config.get("ref") == REFERENCE:
        network.limbeck_config = config["args"]["of"]
    return network
