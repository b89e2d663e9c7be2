"""What a removed channel said on average is kept: it moves into the bias of the layer that read it.

With a batch-norm scale of 0 a channel is the constant relu(beta) (or any other activation of it), so its mean is all that it says, and the
move changes nothing but the rim of padded convolutions, where zeros stand in place of the constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call
from limbeck.structure.pruning.groups import Group

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def mean_inputs(network: nn.Module, batches: Iterable[Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What every convolution and linear layer gets on average, and which batch norm follows which convolution.

    Args:
        network: read in evaluation mode.
        batches: inputs of several batches.

    Returns:
        `{path: (channels in,)}` means over samples and places, and `{path of the layer: path of the norm that reads its output}`.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    follows: dict[str, str] = {}
    alive: list[tuple[Tensor, str]] = []
    hooks = []

    def before(path: str, axis: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].detach().movedim(axis, -1).flatten(0, -2)
            totals[path] = totals.get(path, 0) + rows.double().sum(0)
            counts[path] = counts.get(path, 0) + len(rows)

        return add

    def after(path: str) -> Any:
        return lambda module, args, output: alive.append((output, path))

    def norm(path: str) -> Any:
        def find(module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, maker in alive:
                if tensor is args[0]:
                    follows[maker] = path

        return find

    for path, module in network.named_modules():
        if isinstance(module, _LAYERS):
            hooks.append(module.register_forward_pre_hook(before(path, -1 if isinstance(module, nn.Linear) else 1)))
            hooks.append(module.register_forward_hook(after(path)))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(norm(path)))
    try:
        with torch.no_grad(), evaluating(network):
            for inputs in batches:
                alive.clear()
                call(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / counts[path] for path, total in totals.items()}, follows


@torch.no_grad()
def fold_means(
    network: nn.Module,
    groups: Iterable[Group],
    drops: Mapping[str, Sequence[int]],
    means: Mapping[str, Tensor],
    follows: Mapping[str, str],
) -> list[str]:
    """Add what the units that will be removed say on average to the biases behind them; in place, before `removed`.

    A layer without bias hands it to the running mean of the batch norm that follows.

    Args:
        network: before the removal.
        groups, drops: what is removed.
        means, follows: of `mean_inputs`.

    Returns:
        Paths of layers that have neither, where what the removed units said is lost.
    """
    lost = []
    for group in groups:
        units = list(drops.get(group.name, ()))
        for part in group.slices if units else ():
            module = network.get_submodule(part.path)
            if not part.enters or part.path not in means or not isinstance(module, _LAYERS):
                continue
            places = part.index[units].flatten().to(module.weight.device)
            weight = module.weight.detach().double().movedim(part.dim, 0)[places]  # (removed, out, ...)
            shift = torch.einsum("co,c->o", weight.flatten(2).sum(2) if weight.ndim > 2 else weight, means[part.path][places])
            norm = network.get_submodule(follows[part.path]) if part.path in follows else None
            if module.bias is not None:
                module.bias.add_(shift.to(module.bias.dtype))
            elif norm is not None and norm.running_mean is not None:
                norm.running_mean.sub_(shift.to(norm.running_mean.dtype))
            else:
                lost.append(part.path)
    return lost
