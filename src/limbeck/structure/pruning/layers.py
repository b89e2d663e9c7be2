"""Whole layers: those that give what shape they take can be left out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call
from limbeck.zoo.cut import mark_cut


def block_influence(network: nn.Module, inputs: Any) -> dict[str, float]:
    """How much every layer that could be left out changes what runs through it: 1 - cosine of its input and output, a mean over samples.

    Block influence of ShortGPT (arXiv 2403.03853, equation 1), there a mean over tokens. Layers are the members of a `nn.Sequential` or
    `nn.ModuleList` with parameters whose one input tensor and output tensor have one shape.

    Args:
        network: any module.
        inputs: a batch's inputs.
    """
    said: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for path in _members(network):

        def note(module: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].shape == output.shape:
                said[path] = (args[0], output)

        hooks.append(network.get_submodule(path).register_forward_hook(note))
    try:
        with torch.no_grad(), evaluating(network):
            call(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    inner = [path for path in said if not any(other.startswith(f"{path}.") for other in said)]  # a list of layers is none itself
    return {path: float(1 - F.cosine_similarity(said[path][0].flatten(1), said[path][1].flatten(1)).mean()) for path in inner}


def _members(network: nn.Module) -> list[str]:
    lists = [(path, module) for path, module in network.named_modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    return [
        f"{path}.{name}" if path else name
        for path, module in lists
        for name, child in module.named_children()
        if any(True for _ in child.children()) and any(True for _ in child.parameters())
    ]


def without_layers(network: nn.Module, paths: Iterable[str], inputs: Any) -> nn.Module:
    """A copy of a network in which some layers pass on what they get.

    Args:
        network: left as it is.
        paths: of layers that `block_influence` lists.
        inputs: a batch's inputs.

    Raises:
        UserError: a layer that cannot be left out.
    """
    paths = list(paths)
    possible = block_influence(network, inputs)
    for path in paths:
        if path not in possible:
            offer = ", ".join(possible) or "none"
            raise UserError(f"layer {path!r} of {type(network).__name__} cannot be left out", f"layers that can be: {offer}")
    smaller = copy.deepcopy(network)
    for path in paths:
        parent, _, name = path.rpartition(".")
        if any(path.startswith(f"{other}.") for other in paths):
            continue
        setattr(smaller.get_submodule(parent), name, nn.Identity())
    return mark_cut(network, smaller)
