"""Which module calls are a network's stages: resolution levels, repeated blocks, or hidden activations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

_PASSIVE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Identity, nn.Flatten, nn.Unflatten)
_POOLS = ("Pool",)


@dataclass(eq=False)
class Call:
    """One call of one module in a dry pass, with the calls inside it.

    Attributes:
        path: the module's path ("" is the model).
        module: the module.
        number: which call of this module it is, from 0.
        begin, end: times, counted in events of the pass.
        inputs, outputs: shapes of the tensors that went in and came out.
        shape: shape of the first output tensor when it is floating point, else None.
        children: calls made inside this one.
        is_map: a leaf that puts out an attention map.
    """

    path: str
    module: nn.Module
    number: int
    begin: int
    end: int = -1
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    children: list[Call] = field(default_factory=list)
    is_map: bool = False

    @property
    def level(self) -> tuple[int, ...] | None:
        """The spatial size of a `(B, C, H, W, ...)` output larger than one pixel, else None."""
        return _level(self.shape)

    def walk(self) -> list[Call]:
        """This call and all inside it, in the order in which they began."""
        found = [self]
        for child in self.children:
            found += child.walk()
        return found


def _level(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if shape is None or len(shape) < 4 or all(size == 1 for size in shape[2:]):
        return None
    return shape[2:]


def _weighted(call: Call) -> bool:
    return next(call.module.parameters(), None) is not None


def _contains(call: Call, other: Call | None) -> bool:
    return other is not None and call.begin <= other.begin and other.end <= call.end


def find_stages(root: Call, head: Call | None) -> list[Call]:
    """The stages of a network, shallow to deep.

    Resolution levels (the last module at each) when there are two or more, else the repeated blocks, else each hidden
    activation (or the bare layer where the activation is no module).
    """
    levels = _levels(root, head)
    if len(levels) >= 2:
        return levels
    return _blocks(root) or _activations(root, head) or levels


def _new_levels(call: Call, strict: bool) -> bool:
    """Whether a call hides levels that its own input and output do not show (its input's too, when not strict)."""
    inner = {child.level for child in call.children} - {None}
    known = {call.level}
    if strict:
        known |= {_level(shape) for shape in call.inputs}
    return bool(inner - known) if call.level is not None else bool({c.level for c in call.walk()[1:]} - {None})


def _spine(call: Call, head: Call | None, strict: bool) -> list[Call]:
    """The calls in order, containers opened only as far as they hide resolution levels or the head."""
    if call.children and (_new_levels(call, strict) or _contains(call, head)):
        return [item for child in call.children for item in _spine(child, head, strict)]
    return [call]


def _levels(root: Call, head: Call | None) -> list[Call]:
    stages = _runs(_spine(root, head, strict=True), head)
    return stages if len(stages) >= 2 else _runs(_spine(root, head, strict=False), head)


def _runs(spine: list[Call], head: Call | None) -> list[Call]:
    """The last call of each run of one resolution that has weights in it; a bare stem before composite stages is no stage."""
    runs: list[list[Call]] = []
    for here in spine:
        if here is head or here.level is None:
            continue
        if runs and runs[-1][-1].level == here.level:
            runs[-1].append(here)
        else:
            runs.append([here])
    runs = [run for run in runs if any(_weighted(here) for here in run)]
    lasts = [_last_active(run) for run in runs]
    if len(lasts) > 2 and not lasts[0].children and all(last.children for last in lasts[1:]):
        lasts = lasts[1:]
    return lasts


def _last_active(run: list[Call]) -> Call:
    active = [here for here in run if not isinstance(here.module, _PASSIVE)]
    return (active or run)[-1]


def _blocks(root: Call) -> list[Call]:
    """The longest row of sibling calls of one composite class with outputs of one rank; the outermost when rows are equally long."""
    best: list[Call] = []
    for parent in root.walk():
        composite = [child for child in parent.children if child.children and child.shape is not None and len(child.shape) >= 2]
        kinds = Counter((type(child.module), len(child.shape or ())) for child in composite)
        for kind, count in kinds.items():
            if count >= 2 and count > len(best) and kind[0] not in (nn.ModuleList,):
                best = [child for child in composite if (type(child.module), len(child.shape or ())) == kind]
    return best


def _activations(root: Call, head: Call | None) -> list[Call]:
    """For each weighted leaf before the head: the last call before the next one that is no dropout, pooling or reshaping."""
    leaves = [here for here in root.walk() if not here.children and here.shape is not None and here is not root]
    stages: list[Call] = []
    for here in leaves:
        if here is head:
            break
        layer = isinstance(here.module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.Embedding))
        passive = isinstance(here.module, _PASSIVE) or any(word in type(here.module).__name__ for word in _POOLS)
        if layer:
            stages.append(here)
        elif stages and not passive:
            stages[-1] = here
    return stages
