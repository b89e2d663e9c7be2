"""Networks that compute with quantised weights and train the full-precision ones behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.errors import UserError, unknown
from limbeck.zoo.quantised.grid import best_clip, fake, fake_activations, first_points
from limbeck.zoo.quantised.scheme import Scheme

ENDS = ("same", "8bit", "full")
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class FakeQuantised(nn.Module):
    """What stands between a layer and its weight: `weight -> quantised weight`, registered as a parametrization of torch.

    Args:
        weight: the full-precision weight.
        scheme: how it is quantised.
        axis: of the output channels.

    Attributes:
        points: `(s,)` learned levels, a parameter, where the scheme has them; else None.
        clip: `(G, 1)` clipped ranges (`clip_ranges`), or None.
    """

    clip: Tensor | None

    def __init__(self, weight: Tensor, scheme: Scheme, axis: int = 0) -> None:
        super().__init__()
        self.scheme, self.axis = scheme, axis
        self.points = nn.Parameter(first_points(weight, scheme, axis)) if scheme.learned else None
        self.register_buffer("clip", None)

    def levels(self) -> Tensor | None:
        """The learned points in order; None where the levels are fixed. A point that passes another keeps its optimiser's momentum."""
        return None if self.points is None else self.points.sort().values

    def forward(self, weight: Tensor) -> Tensor:
        """The weight at its quantised values."""
        stochastic = self.training and self.scheme.rounding == "stochastic"
        return fake(weight, self.scheme, axis=self.axis, points=self.levels(), clip=self.clip, stochastic=stochastic)


class QuantisedInputs:
    """A forward pre-hook that quantises a layer's inputs. `tokens`: one scale for each last axis, else one a sample."""

    def __init__(self, bits: int, tokens: bool) -> None:
        self.bits, self.tokens = bits, tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        return fake_activations(args[0], self.bits, self.tokens), *args[1:]


def channel_axis(layer: nn.Module) -> int | None:
    """The axis of a layer's weight that holds output channels (rows of an embedding); None for layers that have no quantised form."""
    if isinstance(layer, _KINDS):
        return 0
    if type(layer).__name__.endswith("Conv1D") and any(kind.__module__ == "transformers.pytorch_utils" for kind in type(layer).__mro__):
        return 1  # transformers' own, whose weight is (in, out)
    return None


def quantise_inputs(layer: nn.Module, scheme: Scheme) -> None:
    """Make a layer quantise what it reads, where the scheme says so; embeddings read numbers of tokens and stay."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, QuantisedInputs):
            del layer._forward_pre_hooks[key]
    if scheme.activations is not None and not isinstance(layer, nn.Embedding):
        tokens = not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        layer.register_forward_pre_hook(QuantisedInputs(scheme.activations, tokens))


def fake_of(layer: nn.Module) -> FakeQuantised | None:
    """The quantiser of a layer's weight; None where the weight is plain."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    found = [p for p in layer.parametrizations["weight"] if isinstance(p, FakeQuantised)]  # type: ignore[union-attr,index]
    return found[0] if found else None


def fakes(network: nn.Module) -> Iterator[tuple[str, nn.Module, FakeQuantised]]:
    """(name, layer, quantiser) of every fake-quantised layer; layers that share a weight share the quantiser."""
    for name, layer in network.named_modules():
        quantiser = fake_of(layer)
        if quantiser is not None:
            yield name, layer, quantiser


def full_weight(layer: nn.Module) -> nn.Parameter:
    """The full-precision weight that a fake-quantised layer trains."""
    return layer.parametrizations["weight"].original  # type: ignore[union-attr,index,return-value]


def quantisable(network: nn.Module) -> dict[str, nn.Module]:
    """Layers that have a quantised form, by name, in the network's order."""
    return {name: m for name, m in network.named_modules() if channel_axis(m) is not None and isinstance(_own_weight(m), nn.Parameter)}


def _own_weight(layer: nn.Module) -> Any:
    return layer._parameters.get("weight")


def without_form(network: nn.Module) -> list[str]:
    """Names of modules that hold matrices of their own and have no quantised form (recurrent layers, free position tables)."""
    known = set(quantisable(network).values())
    return [
        name
        for name, module in network.named_modules()
        if module not in known
        and not isinstance(module, parametrize.ParametrizationList)
        and any(p is not None and p.ndim >= 2 for p in module._parameters.values())
    ]


def quantise(
    network: nn.Module,
    scheme: Scheme,
    *,
    ends: str = "same",
    layers: Sequence[str] | None = None,
    levels: Mapping[str, int] | None = None,
) -> list[str]:
    """Make a network compute with quantised weights, in place; its full-precision weights stay and are what trains.

    Biases, norms and free tables of positions stay as they are.

    Args:
        network: any module.
        scheme: for every layer.
        ends: how the first layer, the last layer and embeddings are held: "same" as all others, "8bit" (256 levels, one scale a
            channel), or "full" precision.
        layers: names of the layers to quantise; None for all that have a quantised form.
        levels: other numbers of levels by layer's name.

    Returns:
        Sentences about what stays as it is.

    Raises:
        UserError: unknown names, layers without a quantised form that are named, a network that is quantised already or has nothing to
            quantise.
    """
    if ends not in ENDS:
        raise unknown("way to hold the first and last layers", ends, ENDS)
    if any(True for _ in fakes(network)) or any(getattr(m, "coded_weights", 0) for m in network.modules()):
        raise UserError(f"{type(network).__name__} is quantised already", "unfold it first: limbeck.zoo.quantised.unfold(network)")
    known, formless = quantisable(network), without_form(network)
    if not known:
        raise UserError(f"{type(network).__name__} has no layer that can be quantised", "linear, convolution and embedding layers can be")
    for name in layers or ():
        if name in formless:
            kind = type(network.get_submodule(name)).__name__
            raise UserError(f"layer {name!r} is a {kind}, which has no quantised form", "leave it out of `layers`")
        if name not in known:
            raise unknown("layer", name, known)
    chosen = {name: known[name] for name in (layers or known)}
    outer = _ends(known)
    shared: dict[int, FakeQuantised] = {}
    for name, layer in chosen.items():
        if name in outer and ends == "full":
            continue
        own = Scheme(levels=256, group="channel", activations=scheme.activations and 8) if name in outer and ends == "8bit" else scheme
        if levels is not None and name in levels and not (name in outer and ends == "8bit"):
            own = own.with_levels(levels[name])
        weight = layer.weight
        quantiser = shared.get(id(weight))
        if quantiser is None:
            quantiser = shared[id(weight)] = FakeQuantised(weight, own, channel_axis(layer) or 0)
        parametrize.register_parametrization(layer, "weight", quantiser)
        quantise_inputs(layer, own)
    left = [f"{name} ({type(network.get_submodule(name)).__name__ if name else type(network).__name__})" for name in formless]
    return [f"not quantised, because such layers have no quantised form: {', '.join(left)}"] if left else []


def _ends(known: Mapping[str, nn.Module]) -> set[str]:
    """The first and the last layer, embeddings, and whatever shares a weight with them."""
    names = list(known)
    found = {names[0], names[-1], *(name for name, layer in known.items() if isinstance(layer, nn.Embedding))}
    weights = {id(known[name].weight) for name in found}
    return {name for name, layer in known.items() if name in found or id(layer.weight) in weights}


def clip_ranges(network: nn.Module) -> None:
    """Let every fake-quantised layer clip its ranges where that lowers the squared error of its weights (see `best_clip`).

    For quantisation after training; learned points are left alone.
    """
    for _, layer, quantiser in fakes(network):
        if not quantiser.scheme.learned:
            quantiser.clip = best_clip(full_weight(layer), quantiser.scheme, quantiser.axis)
