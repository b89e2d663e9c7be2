"""What goes together when a part of a network is removed, and the removal itself."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.zoo.cut import mark_cut


@dataclass(frozen=True)
class Slice:
    """The places of one tensor that belong to a group's units.

    Attributes:
        path: of the module that holds the tensor.
        tensor: its name there.
        dim: the axis that gets shorter.
        index: `(units, k)` the k places on that axis that go with each unit.
        enters: these weights read what the units say (input side of the next layer); else they make it.
        norm: the scale of a norm with one factor a channel.
    """

    path: str
    tensor: str
    dim: int
    index: Tensor
    enters: bool = False
    norm: bool = False


@dataclass(frozen=True)
class Group:
    """Units (channels or heads) of one kind that can each be removed without changing what the network takes and gives.

    Attributes:
        name: path of the module that makes them.
        kind: "channels" or "heads".
        units: how many there are.
        slices: every tensor that they run through.
        numbers: `(module path, attribute, step)`: whole numbers that fall by `step` for each unit removed.
    """

    name: str
    kind: str
    units: int
    slices: tuple[Slice, ...]
    numbers: tuple[tuple[str, str, int], ...]

    @property
    def tied(self) -> bool:
        """Several layers make these channels, around a shortcut: one mask removes them in all of these layers."""
        made = [path for path, attribute, _ in self.numbers if attribute in ("out_channels", "out_features")]
        passed = {path for path, attribute, _ in self.numbers if attribute == "groups"}
        return len(set(made) - passed) > 1


def removed(network: nn.Module, groups: Iterable[Group], drops: Mapping[str, Sequence[int]]) -> nn.Module:
    """A smaller copy of a network.

    Args:
        network: left as it is.
        groups: what `find_groups` found on it.
        drops: the units to remove, by the group's name; a group must keep one unit.

    Returns:
        The copy; it carries a `limbeck_config` by which `limbeck.zoo.load_model` makes it again.
    """
    smaller = copy.deepcopy(network)
    gone: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
    fewer: dict[tuple[str, str], int] = defaultdict(int)
    for group in groups:
        units = sorted(set(drops.get(group.name, ())))
        if not units:
            continue
        if len(units) >= group.units or units[0] < 0 or units[-1] >= group.units:
            raise ValueError(f"{group.name} has {group.units} units; {len(units)} cannot be removed")
        for part in group.slices:
            gone[part.path, part.tensor, part.dim].append(part.index[units].flatten())
        for path, attribute, step in group.numbers:
            fewer[path, attribute] += step * len(units)
    for (path, name, dim), places in gone.items():
        _shorten(smaller.get_submodule(path), name, dim, torch.cat(places))
    for (path, attribute), count in fewer.items():
        module = smaller.get_submodule(path)
        setattr(module, attribute, getattr(module, attribute) - count)
    return mark_cut(network, smaller)


def _shorten(module: nn.Module, name: str, dim: int, places: Tensor) -> None:
    """Drop places of one axis of a parameter or buffer."""
    old = getattr(module, name)
    keep = torch.ones(old.shape[dim], dtype=torch.bool)
    keep[places] = False
    new = old.detach().index_select(dim, keep.nonzero().squeeze(1).to(old.device)).clone()
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
