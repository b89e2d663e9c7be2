"""Networks that lost channels, heads or layers: what they are described by, and how they are made again.

No constructor argument tells the shapes of a pruned network. Its `limbeck_config = {"ref": "cut:network", "args": {"of", "shapes"}}` names
the network that it was cut from, and what differs from that one, module by module. Cutting a cut network nests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError

REFERENCE = "cut:network"
REMOVED = "removed"
"""Stands for a module that became `nn.Identity`."""

Shapes = dict[str, Any]


def _numbers(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are whole numbers or tuples of them: widths, groups, heads."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    return {
        name: value
        for name, value in vars(module).items()
        if whole(value) or (isinstance(value, tuple) and value and all(map(whole, value)))
    }


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a module holds itself."""
    return {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}


def differences(original: nn.Module, network: nn.Module) -> Shapes:
    """What a cut network has otherwise than the network that it was cut from.

    Returns:
        `{module path: {"tensors": {name: shape}, "numbers": {attribute: value}}}`, or `{path: "removed"}`; JSON holds it.
    """
    found: Shapes = {}
    cut = dict(network.named_modules())
    gone: list[str] = []
    for path, module in original.named_modules():
        if any(path.startswith(f"{parent}.") for parent in gone):
            continue
        other = cut[path]
        if isinstance(other, nn.Identity) and not isinstance(module, nn.Identity):
            found[path] = REMOVED
            gone.append(path)
            continue
        tensors = _own_tensors(other)
        shapes = {name: list(tensors[name].shape) for name, t in _own_tensors(module).items() if tensors[name].shape != t.shape}
        numbers = _numbers(other)
        changed = {name: numbers[name] for name, value in _numbers(module).items() if numbers[name] != value}
        if shapes or changed:
            found[path] = {"tensors": shapes, "numbers": {n: list(v) if isinstance(v, tuple) else v for n, v in changed.items()}}
    return found


def mark_cut(original: nn.Module, network: nn.Module) -> nn.Module:
    """Let a cut network say how it can be made again, so that `save_model` and `load_model` work on it.

    Args:
        original: what it was cut from, with its `limbeck_config` where it has one.
        network: changed in place.

    Returns:
        `network`.
    """
    of = getattr(original, "limbeck_config", None)
    network.limbeck_config = {"ref": REFERENCE, "args": {"of": of, "shapes": differences(original, network)}}  # type: ignore[assignment]
    return network


def made_from(network: nn.Module) -> dict[str, Any]:
    """The arguments that a network was built with, of a cut one those before the first cut; {} where none are known."""
    made = getattr(network, "limbeck_config", None) or {}
    while made.get("ref") == REFERENCE:
        made = made["args"]["of"] or {}
    return dict(made.get("args", {}))


def resize(network: nn.Module, shapes: Mapping[str, Any]) -> nn.Module:
    """Give a network the shapes of a cut one; new tensors hold zeros until weights are loaded. In place; a second time changes nothing.

    Raises:
        UserError: shapes that are not of this network (no such module, tensor or attribute; a tensor that would grow).
    """
    for path, entry in shapes.items():
        try:
            module = network.get_submodule(path)
        except AttributeError:
            raise _foreign(network, f"it has no module {path!r}") from None
        if entry == REMOVED:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, nn.Identity())
            continue
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(part, {}), Mapping) for part in ("tensors", "numbers")):
            raise _foreign(network, f"its entry for {path!r} is not readable")
        for name, shape in entry.get("tensors", {}).items():
            _shrink(network, module, path, name, shape)
        own = _numbers(module)
        for name, value in entry.get("numbers", {}).items():
            if name not in own or isinstance(value, list) != isinstance(own[name], tuple):
                raise _foreign(network, f"module {path!r} has no number {name!r}")
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (value if isinstance(value, list) else [value])):
                raise _foreign(network, f"{name!r} of module {path!r} would be {value!r}")
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    return network


def _shrink(network: nn.Module, module: nn.Module, path: str, name: str, shape: Any) -> None:
    old = _own_tensors(module).get(name)
    if old is None:
        raise _foreign(network, f"module {path!r} has no tensor {name!r}")
    sizes = shape if isinstance(shape, list) and all(isinstance(n, int) for n in shape) else []
    if len(sizes) != old.ndim or not all(0 < n <= most for n, most in zip(sizes, old.shape)):
        raise _foreign(network, f"{path}.{name} has shape {tuple(old.shape)}, and would become {shape}")
    if list(old.shape) == sizes:
        return
    new = torch.zeros(sizes, dtype=old.dtype, device=old.device)
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _foreign(network: nn.Module, why: str) -> UserError:
    return UserError(f"these are not the shapes of a cut {type(network).__name__}: {why}", "give the network that it was cut from")


def rebuild_cut(of: Any, shapes: Mapping[str, Any]) -> nn.Module:
    """Make a cut network again, its tensors without their weights.

    Args:
        of: `{"ref", "args"}` of the network that it was cut from.
        shapes: what `differences` gave.

    Raises:
        UserError: that network was not made by `limbeck.zoo.build`, or the shapes are not its own.
    """
    from limbeck.zoo.build import build

    if not isinstance(of, Mapping) or not isinstance(of.get("ref"), str) or not isinstance(of.get("args", {}), Mapping):
        raise UserError(
            "a network that was cut from a Python object cannot be made again by limbeck alone",
            "give load_model(folder, model=<the network before the cut>)",
        )
    if not isinstance(shapes, Mapping):
        raise UserError("the shapes of a cut network are not readable", "restore or remake the folder")
    original = build(of["ref"], **of.get("args", {}))
    network = resize(original, shapes)
    network.limbeck_config = {"ref": REFERENCE, "args": {"of": dict(of), "shapes": dict(shapes)}}  # type: ignore[assignment]
    return network.train()
