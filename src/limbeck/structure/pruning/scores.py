"""How much the units of a group matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.signals.modes import evaluating
from limbeck.structure.pruning.groups import Group


def scales(network: nn.Module, group: Group) -> Tensor | None:
    """`(M, units)` |gamma| of the M norms with one factor a channel that a group runs through; None where there is none."""
    found = [s for s in group.slices if s.norm and s.index.shape[1] == 1]
    if not found:
        return None
    return torch.stack([network.get_submodule(s.path).weight.detach().abs()[s.index.flatten()] for s in found]).cpu()


def magnitude(network: nn.Module, group: Group) -> Tensor:
    """`(1, units)` length of all weights of a unit, over the group's mean, so that layers of different width compare.

    The group criterion of DepGraph (Fang et al., arXiv 2301.12900), with the weights that read the unit among them.
    """
    total = torch.zeros(group.units)
    for part in group.slices:
        tensor = getattr(network.get_submodule(part.path), part.tensor)
        if not part.norm and isinstance(tensor, nn.Parameter):
            total += _per_unit(tensor.detach().square(), part.dim, part.index).cpu()
    length = total.sqrt()
    return (length / length.mean().clamp_min(1e-12)).unsqueeze(0)


def taylor(network: nn.Module, groups: Iterable[Group], losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """`{group: (1, units)}` |theta dL/dtheta| summed over a unit's weights, averaged over batches.

    First-order Taylor sensitivity (Molchanov et al., arXiv 1906.10771), absolute value for each weight. The network is read in evaluation
    mode, with gradients; none is left behind.

    Args:
        network: its loss is what `losses` give.
        groups: of this network.
        losses: one function for each calibration batch.
    """
    groups = list(groups)
    total = {group.name: torch.zeros(group.units) for group in groups}
    count = 0
    parameters = [p for p in network.parameters() if p.requires_grad]
    with evaluating(network), torch.enable_grad():
        for loss in losses:
            gradients = dict(zip(map(id, parameters), torch.autograd.grad(loss(), parameters, allow_unused=True)))
            count += 1
            for group in groups:
                for part in group.slices:
                    tensor: Any = getattr(network.get_submodule(part.path), part.tensor)
                    gradient = gradients.get(id(tensor))
                    if gradient is not None:
                        total[group.name] += _per_unit((tensor.detach() * gradient).abs(), part.dim, part.index).cpu()
    return {name: (value / max(count, 1)).unsqueeze(0) for name, value in total.items()}


def _per_unit(values: Tensor, dim: int, index: Tensor) -> Tensor:
    """`(units,)` sums of `values` over the places of each unit."""
    rows = values.movedim(dim, 0).flatten(1).sum(1) if values.ndim > 1 else values
    return rows[index.to(rows.device)].sum(1)
