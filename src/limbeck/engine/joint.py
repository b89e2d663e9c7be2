"""Gradients that are means over all processes: torch's DistributedDataParallel round the losses of a turn, not round a network.

Methods read networks in many ways (up to a tap, up to the output matrix, twice in a step, with bridges beside them). Wrapped is therefore
what they all have in common: a call that gives the terms of a loss, and the weights whose turn it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from limbeck import processes
from limbeck.engine import sharding
from limbeck.engine.clock import Clock
from limbeck.engine.program import Program
from limbeck.errors import UserError


class _Losses(nn.Module):
    """The losses of a turn as a module that owns the turn's weights."""

    def __init__(self, program: Program, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self._losses = program.losses

    def forward(self, turn: str, part: Any, clock: Clock) -> dict[str, Tensor]:
        terms = self._losses(turn, part, clock)
        self.own = any(value.requires_grad for value in terms.values())
        if not self.own:  # this share has nothing to learn from (no label, no scored token), and the others wait for its gradient
            name, value = next(iter(terms.items()))
            terms = {**terms, name: value + 0.0 * self.weights[0].sum()}
        return terms


class JointTurn:
    """The losses of a turn on every process.

    Weights that are sharded average their gradients by themselves; all others go through DistributedDataParallel, in which a weight that
    no process used keeps no gradient, as on one process.

    Attributes:
        last: whether the next part of a batch is its last: only then gradients travel.
    """

    def __init__(self, program: Program, weights: list[nn.Parameter]) -> None:
        self.last, self._program, self._whole = True, program, None
        if weights:
            # every loss may leave some weights out in some steps
            self._whole = DistributedDataParallel(_Losses(program, weights), find_unused_parameters=True, gradient_as_bucket_view=True)

    def __call__(self, turn: str, part: Any, clock: Clock) -> dict[str, Tensor]:
        """The terms of one part; their backward pass averages gradients when it is the last one."""
        if self._whole is None:
            terms = self._program.losses(turn, part, clock)
            if not any(value.requires_grad for value in terms.values()):  # the others would wait for its part of the gradient
                raise UserError(
                    f"process {processes.rank()} has nothing to learn from in step {clock.step}: no label, no scored token in its share",
                    "set parallel=ddp, or a larger training.batch",
                )
            return terms
        if self.last:
            return self._whole(turn, part, clock)
        with self._whole.no_sync():
            return self._whole(turn, part, clock)

    def reached(self, step: int, loss: Tensor) -> bool:
        """Whether the loss has a gradient on some process; asked of the others in the first step only."""
        if step > 0:
            return True
        return any(processes.every(loss.requires_grad if self._whole is None else self._whole.module.own))


def joint_turn(program: Program, optimizer: torch.optim.Optimizer) -> JointTurn:
    """The losses of the turn whose weights an optimiser holds."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if sharding.mixed(weights):
        for group in optimizer.param_groups:
            group["foreach"] = False
    return JointTurn(program, [weight for weight in dict.fromkeys(weights) if not sharding.is_shard(weight)])
