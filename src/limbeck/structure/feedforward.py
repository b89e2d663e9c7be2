"""Feed-forward parts of transformer blocks that become linear maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import zoo
from limbeck.errors import UserError
from limbeck.evaluation.budget import Budget
from limbeck.structure.intervals import linear_fit

Ends = dict[int, tuple[Tensor, Tensor]]
"""Block number -> what goes into its feed-forward part and what comes out, `(B, L, D)` each."""


def linear_layers(network: nn.Module, read: Callable[[], Any], numbers: Sequence[int]) -> Ends:
    """Inputs and outputs of some blocks' feed-forward parts in one pass without gradient."""
    found: Ends = {}

    def note(number: int) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(number, (args[0], output))

    handles = [network.blocks[number].mlp.register_forward_hook(note(number)) for number in numbers]  # type: ignore[union-attr,index]
    try:
        with torch.no_grad():
            read()
    finally:
        for handle in handles:
            handle.remove()
    return found


def straightened(
    network: nn.Module,
    reads: Sequence[Callable[[], Any]],
    share: float,
    budget: Budget | None,
    cost: Callable[[nn.Module], dict[str, Any]],
    decided: Callable[[str, Callable[[], Any]], Any],
) -> tuple[nn.Module, list[int]]:
    """A network whose most nearly linear feed-forward parts are linear maps, begun by least squares.

    Args:
        network: made with an argument `linear` (dit); not changed.
        reads: passes over training batches.
        share: of the blocks whose part goes, where there is no budget.
        budget, cost, decided: see `limbeck.structure.shaper.Making`.

    Returns:
        The network, and the numbers of the blocks that now have a linear map.

    Raises:
        UserError: the network has no such argument, or the budget cannot be met.
    """
    config = getattr(network, "limbeck_config", None) or {}
    done = list(getattr(network, "linear", ()))
    if not hasattr(network, "linear") or not config:
        raise UserError(f"the feed-forward parts of {type(network).__name__} cannot become linear maps", "use dit, or phase depth")
    numbers = [number for number in range(len(network.blocks)) if number not in done]  # type: ignore[arg-type]
    if not numbers:
        raise UserError("every feed-forward part is a linear map already", "leave this stage out")
    passes = [linear_layers(network, read, numbers) for read in reads]
    maps, misses = {}, {}
    for number in numbers:
        x = torch.cat([found[number][0].flatten(0, -2) for found in passes])
        y = torch.cat([found[number][1].flatten(0, -2) for found in passes])
        maps[number] = linear_fit(x, y)
        misses[number] = float((x @ maps[number][0].T + maps[number][1] - y).square().sum() / y.square().sum().clamp_min(1e-12))
    order = sorted(numbers, key=misses.__getitem__)

    def made_of(count: int) -> nn.Module:
        return _with_maps(network, config, done, {number: maps[number] for number in order[:count]})

    def count_of() -> int:
        if budget is None:
            return max(1, round(share * len(order)))
        for count in range(1, len(order) + 1):
            price = cost(made_of(count))
            if budget.met(price):
                return count
        raise budget.refuse(price, "linear maps in place of all feed-forward parts")

    count = int(decided("maps", count_of))
    return made_of(count), sorted(order[:count])


def _with_maps(network: nn.Module, config: dict[str, Any], done: list[int], maps: dict[int, tuple[Tensor, Tensor]]) -> nn.Module:
    random = torch.get_rng_state()
    made = zoo.build(config["ref"], **{**config["args"], "linear": sorted([*done, *maps])})
    torch.set_rng_state(random)
    gone = tuple(f"blocks.{number}.mlp." for number in maps)
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(gone)}
    for number, (matrix, shift) in maps.items():
        weights |= {f"blocks.{number}.mlp.weight": matrix, f"blocks.{number}.mlp.bias": shift}
    made.load_state_dict(weights)
    return made.to(next(network.parameters()).device).train(network.training)
