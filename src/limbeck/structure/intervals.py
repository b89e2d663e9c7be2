"""Runs of a network's blocks that one block can stand for: how they are found, and networks put together from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import zoo
from limbeck.errors import UserError

Interval = tuple[int, int]
"""First and last block of a run, both included; one block in its place removes last - first blocks."""


def blocks_of(network: nn.Module) -> nn.ModuleList:
    """The list of blocks of a network that is made with a `depth`.

    Raises:
        UserError: it has no such list, or its depth is no argument that it can be made again with.
    """
    blocks = getattr(network, "blocks", None)
    config = getattr(network, "limbeck_config", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
        raise UserError(
            f"{type(network).__name__} has no list of blocks (`blocks`, a torch.nn.ModuleList of at least two)",
            "give a diffusion transformer such as dit",
        )
    if not config or len(blocks) != _depth(network):
        raise UserError(f"{type(network).__name__} cannot be made again with fewer blocks", "build it with limbeck.zoo.build")
    shapes = [[(name, tuple(p.shape)) for name, p in block.named_parameters()] for block in blocks]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(f"the blocks of {type(network).__name__} differ in shape, and one cannot stand for another", "prune it by channels")
    return blocks


def _depth(network: nn.Module) -> int:
    """The depth that a network was built with: its argument, or the default of it."""
    import inspect

    given = network.limbeck_config["args"].get("depth")
    takes = inspect.signature(type(network).__init__).parameters.get("depth")
    return int(given) if given is not None else int(takes.default) if takes is not None and takes.default is not takes.empty else 0


class _Enough(BaseException):
    """Ends a pass behind the last block that is looked at."""


@dataclass
class Flow:
    """What went through the blocks of a network in one pass.

    Attributes:
        inputs: block number -> positional arguments, of which the first is `(B, L, D)`.
        outputs: block number -> `(B, L, D)`.
    """

    inputs: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def flowing(network: nn.Module, begin: Sequence[int], end: Sequence[int]) -> Iterator[Flow]:
    """Meanwhile a pass through the network notes the inputs of the blocks `begin` and the outputs of the blocks `end`."""
    flow, handles, blocks = Flow(), [], blocks_of(network)

    def enter(number: int) -> Callable[..., None]:
        return lambda module, args: flow.inputs.__setitem__(number, args)

    def leave(number: int) -> Callable[..., None]:
        return lambda module, args, output: flow.outputs.__setitem__(number, output)

    try:
        handles += [blocks[number].register_forward_pre_hook(enter(number)) for number in begin]
        handles += [blocks[number].register_forward_hook(leave(number)) for number in end]
        yield flow
    finally:
        for handle in handles:
            handle.remove()


def pass_through(network: nn.Module, read: Callable[[], Any], begin: Sequence[int], end: Sequence[int]) -> Flow:
    """One pass without gradient that stops behind the last block of `end`.

    Args:
        network: see `blocks_of`; in evaluation mode.
        read: runs it once.
        begin, end: see `flowing`.
    """

    def stop(*_: Any) -> None:
        raise _Enough

    with flowing(network, begin, end) as flow, torch.no_grad():
        handle = blocks_of(network)[max([*begin, *end])].register_forward_hook(stop)
        try:
            read()
        except _Enough:
            pass
        finally:
            handle.remove()
    return flow


def linear_fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The least squares map `y ~ x A^T + b`, in float64.

    Args:
        x: `(N, D)`; y: `(N, E)`.

    Returns:
        A `(E, D)` and b `(E,)`, in float32.
    """
    wide = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], 1)
    found = torch.linalg.lstsq(wide.cpu(), y.double().cpu(), driver="gelsd").solution
    return found[:-1].T.float().to(x.device), found[-1].float().to(x.device)


def similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine of corresponding tokens, 1 where they point the same way.

    Args:
        a, b: `(..., D)`.
    """
    return float(nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def probe(network: nn.Module, reads: Sequence[Callable[[], Any]]) -> Tensor:
    """How little each block is missed when a linear map stands for it.

    For block i the map h_{i+1} ~ A_i h_i + b_i is fitted on the tokens of the first half of the passes; on the second half it replaces
    the block, and s_i is the mean cosine between what then leaves the last block and what does so usually.

    Args:
        network: see `blocks_of`.
        reads: passes through it, at least two.

    Returns:
        `(blocks,)` s_i, at most 1.
    """
    blocks = blocks_of(network)
    every, half = range(len(blocks)), (len(reads) + 1) // 2
    flows = [pass_through(network, read, every, every) for read in reads]
    scores = []
    for number in every:
        x = torch.cat([flow.inputs[number][0].flatten(0, -2) for flow in flows[:half]])
        y = torch.cat([flow.outputs[number].flatten(0, -2) for flow in flows[:half]])
        matrix, shift = linear_fit(x, y)
        seen = []
        for flow in flows[half:]:
            h = flow.inputs[number][0] @ matrix.T + shift
            with torch.no_grad():
                for later in range(number + 1, len(blocks)):
                    h = blocks[later](h, *flow.inputs[later][1:])
            seen.append(similarity(h, flow.outputs[len(blocks) - 1]))
        scores.append(sum(seen) / len(seen))
    return torch.tensor(scores, dtype=torch.float64)


def merged(costs: Sequence[float], remove: int, longest: int) -> list[Interval]:
    """The runs that come of joining neighbours where it costs least.

    Args:
        costs: `costs[i]` of joining blocks i and i + 1; infinite where they must stay apart.
        remove: how many blocks shall go, which is how many neighbours are joined.
        longest: blocks of a run at most.

    Returns:
        Runs of two blocks and more, in order.

    Raises:
        UserError: so many cannot be removed.

    >>> merged([0.1, 0.9, 0.2, 0.3], 2, 3)
    [(0, 1), (2, 3)]
    """
    joined: set[int] = set()
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], i)):
        if len(joined) == remove or costs[place] == float("inf"):
            break
        if max(b - a + 1 for a, b in _runs(joined | {place})) <= longest:
            joined.add(place)
    if len(joined) < remove:
        raise UserError(f"{remove} of {len(costs) + 1} blocks cannot go in runs of at most {longest}", f"remove {len(joined)} at most")
    return _runs(joined)


def _runs(joined: set[int]) -> list[Interval]:
    found: list[Interval] = []
    for place in sorted(joined):
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def places(depth: int, intervals: Sequence[Interval]) -> list[Interval]:
    """For each block of the shortened network the run that it stands for; a kept block i is (i, i).

    >>> places(5, [(1, 3)])
    [(0, 0), (1, 3), (4, 4)]
    """
    found, number = [], 0
    begins = dict(intervals)
    while number < depth:
        last = begins.get(number, number)
        found.append((number, last))
        number = last + 1
    return found


def shortened(network: nn.Module, intervals: Sequence[Interval]) -> nn.Module:
    """A network of the same kind in which the first block of each run stands for all of it.

    Args:
        network: see `blocks_of`; not changed.
        intervals: runs that do not overlap.
    """
    return assembled(network, intervals, [copy.deepcopy(blocks_of(network)[a]) for a, _ in intervals])


def assembled(network: nn.Module, intervals: Sequence[Interval], segments: Sequence[nn.Module]) -> nn.Module:
    """A plain network with a block in the place of each run, all else copied.

    Args:
        network: see `blocks_of`; not changed.
        intervals: runs that do not overlap; segments: a block for each.
    """
    blocks = blocks_of(network)
    config = network.limbeck_config
    stands = dict(zip(intervals, segments))
    kept = places(len(blocks), intervals)
    own = [stands[run] if run in stands else blocks[run[0]] for run in kept]
    random = torch.get_rng_state()
    made = zoo.build(config["ref"], **{**config["args"], "depth": len(kept)})
    torch.set_rng_state(random)
    prefix = "blocks."
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(prefix)}
    for number, block in enumerate(own):
        weights |= {f"{prefix}{number}.{name}": value for name, value in block.state_dict().items()}
    made.load_state_dict(weights)
    return made.to(next(network.parameters()).device).train(network.training)


def plugged(teacher: nn.Module, student: nn.Module, intervals: Sequence[Interval], which: Sequence[int]) -> nn.Module:
    """A network of another size from one distillation: only some of the runs are replaced, the others are the teacher's own blocks.

    Works because every segment was trained between the teacher's own features, see `limbeck.structure.methods.ppcl`.

    Args:
        teacher: with all its blocks.
        student: with a block for each of `intervals`.
        which: positions in `intervals` of the runs that are replaced.
    """
    kept = places(len(blocks_of(teacher)), intervals)
    trained = {run: blocks_of(student)[number] for number, run in enumerate(kept)}
    chosen = [intervals[number] for number in sorted(which)]
    return assembled(teacher, chosen, [trained[run] for run in chosen])
