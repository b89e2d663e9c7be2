"""Finding the groups of a network: torch-pruning traces which channels hang together, and every group is tried before it is offered."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call, first_tensor, logits_of
from limbeck.structure.pruning.groups import Group, Slice, removed
from limbeck.structure.pruning.heads import head_groups

_CLOSE = 1e-4
"""Largest difference, as a share of the largest output, at which two networks say the same."""


@dataclass(frozen=True)
class Groups:
    """What can be removed from a network, and what cannot.

    Attributes:
        groups: in the order of the forward pass's modules.
        refused: why not, by the path of the layer.
    """

    groups: tuple[Group, ...]
    refused: dict[str, str]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def told(self) -> str:
        """The layers that cannot be pruned, at most four of them, for a message."""
        rows = [f"{path}: {why}" for path, why in list(self.refused.items())[:4]]
        return "; ".join(rows) + ("; ..." if len(self.refused) > 4 else "") if rows else "it has no convolutions or linear layers"


def find_groups(network: nn.Module, inputs: Any, kinds: tuple[str, ...] = ("channels", "heads")) -> Groups:
    """The groups of units of a network that can be removed.

    A group is offered when the network without every second of its units says what the whole network says with the weights that read those
    units set to zero. Groups that run through a layer norm, a norm over several channels, an unknown layer, or that are the network's
    outputs, are refused with the reason.

    Args:
        network: any module; its parameters are not changed.
        inputs: a batch's inputs as the network takes them, 2 samples or more.
        kinds: "channels" (of convolutions and linear layers) and "heads" (of attention).

    Raises:
        UserError: torch-pruning is missing, the network cannot be traced, or nothing can be removed (naming the layers).
    """
    if any(kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in type(network).__mro__):
        raise UserError(
            f"{type(network).__name__} is a network of transformers, whose configuration cannot describe single channels",
            "prune a network of limbeck's or your own; slimmoe makes the experts of such networks thinner",
        )
    found: list[Group] = []
    refused: dict[str, str] = {}
    if "channels" in kinds:
        for name, traced in _traced(network, inputs):
            (refused.__setitem__(name, traced) if isinstance(traced, str) else found.append(traced))
    if "heads" in kinds:
        found += head_groups(network)
    offered = []
    # one proof for all: what is wrong with one group shows in the outputs without all of them; only then is each looked at alone
    together = bool(found) and _wrong(network, inputs, found) is None
    for group in found:
        if together or (why := _wrong(network, inputs, [group])) is None:
            offered.append(group)
        else:
            refused[group.name] = why
    names = {group.name for group in offered}
    result = Groups(tuple(offered), {path: why for path, why in refused.items() if path not in names})
    if not offered:
        raise UserError(f"nothing of {type(network).__name__} can be pruned: {result.told()}", "choose another network or method")
    return result


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise UserError("torch-pruning is not installed", "`pip install 'limbeck[prune]'`") from None
    return torch_pruning


def _traced(network: nn.Module, inputs: Any) -> Iterator[tuple[str, Group | str]]:
    """(path, group or why not) of every convolution and linear layer whose outputs no earlier one is tied to."""
    library = _library()
    own = copy.deepcopy(network).eval().requires_grad_(True)
    names: dict[Any, str] = {module: name for name, module in own.named_modules()}
    parameters = {id(p): name for name, p in own.named_parameters()}
    graph = library.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph.build_dependency(own, inputs, forward_fn=lambda model, x: logits_of(call(model, x)), verbose=False)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign forward pass may do to the tracer
        raise UserError(
            f"{type(network).__name__} cannot be traced: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "pruning needs a network whose forward pass torch-pruning can follow",
        ) from None
    for coupled in graph.get_all_groups(root_module_types=[nn.modules.conv._ConvNd, nn.Linear]):
        root = names[coupled[0].dep.target.module]
        yield root, _group(root, coupled, graph, names, parameters)


def _group(root: str, coupled: Any, graph: Any, names: dict[Any, str], parameters: dict[int, str]) -> Group | str:
    """A traced group in this house's terms, or why it cannot be."""
    units = len(coupled[0].idxs)
    slices: list[Slice] = []
    numbers: list[tuple[str, str, int]] = []
    for item in coupled.items:
        target = item.dep.target.module
        if isinstance(target, nn.Parameter):
            path, _, name = parameters[id(target)].rpartition(".")
            index = _index(item.idxs, item.root_idxs, units)
            if index is None:
                return "its channels do not divide evenly over a parameter"
            slices.append(Slice(path, name, item.dep.target.pruning_dim % target.ndim, index))
            continue
        if target not in names or target is None:
            continue  # an operation without weights
        index = _index(item.idxs, item.root_idxs, units)
        if index is None:
            return f"its channels do not divide evenly over {names[target]}"
        told = _module_slices(names[target], target, graph.is_out_channel_pruning_fn(item.dep.handler), index)
        if isinstance(told, str):
            return told
        slices += told[0]
        numbers += told[1]
    if not any(part.enters for part in slices):
        return "its outputs are the network's outputs"
    return Group(root, "channels", units, tuple(slices), tuple(numbers))


def _index(places: list[int], roots: list[int], units: int) -> Tensor | None:
    """`(units, k)` the places of each unit; None where units have different numbers of them."""
    own: dict[int, list[int]] = defaultdict(list)
    for place, root in zip(places, roots):
        own[root].append(place)
    if len(own) != units or len({len(v) for v in own.values()}) != 1:
        return None
    return torch.tensor([own[unit] for unit in range(units)])


def _module_slices(path: str, module: nn.Module, out: bool, index: Tensor) -> tuple[list[Slice], list[tuple[str, str, int]]] | str:
    """The tensors and numbers of one layer that a group runs through, or why it cannot."""
    k = index.shape[1]

    def whole(names: tuple[str, ...], dim: int = 0, norm: bool = False) -> list[Slice]:
        held = [name for name in names if getattr(module, name, None) is not None]
        return [Slice(path, name, dim, index, norm=norm and name == "weight") for name in held]

    def counts(*attributes: str) -> list[tuple[str, str, int]]:
        return [(path, attribute, k) for attribute in attributes]

    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            if module.groups == module.in_channels == module.out_channels:
                return whole(("weight", "bias")), counts("in_channels", "out_channels", "groups")
            return f"{path} is a grouped convolution"
        made, read = (1, 0) if module.transposed else (0, 1)
        if not out:
            return [Slice(path, "weight", read, index, enters=True)], counts("in_channels")
        return whole(("weight",), made) + whole(("bias",)), counts("out_channels")
    if isinstance(module, nn.Linear):
        if not out:
            return [Slice(path, "weight", 1, index, enters=True)], counts("in_features")
        return whole(("weight", "bias")), counts("out_features")
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return whole(("weight", "bias", "running_mean", "running_var"), norm=True), counts("num_features")
    if isinstance(module, nn.GroupNorm):
        if module.num_groups != module.num_channels:
            return f"{path} normalises several channels together"
        return whole(("weight", "bias"), norm=True), counts("num_channels", "num_groups")
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return whole(("weight",)), counts("num_parameters")
    if isinstance(module, nn.Embedding):
        return whole(("weight",), 1), counts("embedding_dim")
    if not any(True for _ in module.parameters(recurse=False)):
        return [], []
    return f"{path} ({type(module).__name__}) normalises or mixes all of them"


def _wrong(network: nn.Module, inputs: Any, groups: Sequence[Group]) -> str | None:
    """Why groups cannot be removed; None where removing every second unit of all is the same as no longer reading them."""
    if any(group.units < 2 for group in groups):
        return "it has one unit only"
    units = {group.name: list(range(0, group.units, 2)) for group in groups}
    reference = copy.deepcopy(network)
    with torch.no_grad(), evaluating(network):
        for group in groups:
            for part in group.slices:
                if part.enters:
                    tensor = getattr(reference.get_submodule(part.path), part.tensor)
                    tensor.index_fill_(part.dim, part.index[units[group.name]].flatten().to(tensor.device), 0.0)
        reference.eval()
        try:
            expected = first_tensor(call(reference, inputs))
            got = first_tensor(call(removed(network, groups, units).eval(), inputs))
        except Exception as error:  # a shape that is written down somewhere in a foreign forward pass
            return f"the network does not run without them ({type(error).__name__})"
    if expected is None or got is None or got.shape != expected.shape:
        return "its outputs are the network's outputs"
    if not float((got - expected).abs().max()) <= _CLOSE * max(1.0, float(expected.abs().max())):
        return "the layers behind it depend on all of them together"
    return None
