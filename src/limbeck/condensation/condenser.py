"""The contract of this wing: what a method that condenses a data set may say. The first file to read before writing one.

One dataclass is one published method; the engine drives it through `CondensationProgram`, one outer step after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.method import Method, setting

if TYPE_CHECKING:
    from limbeck.condensation.problem import Problem
    from limbeck.condensation.synthetic import SyntheticSet
    from limbeck.engine.clock import Clock


@dataclass
class Condenser(Method):
    """A method that makes a small synthetic set of a large real one.

    Class attributes:
        schedule: of every optimiser's learning rate: "constant", "linear" or "cosine" (to 0).
        needs_teachers: whether the recipe must name trained networks in its `teacher` block.
        needs_norm: the kind of normalisation that the inner network must have ("no-batch": none that mixes samples), or "".
        unlabelled: whether labels are never looked at.
        works_on: what kinds of data it can condense, "samples" (pictures, tables) and "graphs".
        contract: settings with which the contract test is quick; nothing else reads them.

    Settings shared by all: `iterations`, the outer steps (a recipe's training.steps overrides it).
    """

    schedule: ClassVar[str] = "constant"
    needs_teachers: ClassVar[bool] = False
    needs_norm: ClassVar[str] = ""
    unlabelled: ClassVar[bool] = False
    works_on: ClassVar[tuple[str, ...]] = ("samples",)
    contract: ClassVar[Mapping[str, Any]] = {}

    iterations: int = setting(0, "outer steps; 0 for methods that optimise nothing", at_least=0)
    init: str = setting("real", "where the images start", choices=("real", "noise", "kmeans"))

    def prepare(self, problem: Problem) -> None:
        """Called once before the first step, also when a run is resumed: experts, pools, features.

        What takes long is an engine program handed to `problem.session.fit`, which goes on where it stopped.
        """

    def begin(self, problem: Problem) -> SyntheticSet:
        """The set as it is before the first step."""
        return problem.initial(self.init)

    def modules(self) -> dict[str, nn.Module]:
        """What is trained beside the set, by name; saved in checkpoints."""
        return {}

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        """One optimiser for each turn; empty for methods that optimise nothing."""
        return {}

    def turns(self, clock: Clock) -> tuple[str, ...]:
        """Whose turn it is in this step, in order."""
        return ("set",)

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        """The terms of one turn, by name: scalars that the engine sums and back-propagates."""
        raise NotImplementedError

    def views(self, x: Tensor) -> Tensor:
        """Synthetic samples `(B, ...)` as the matching sees them: `(k * B, ...)`, copies behind the originals; usually as they are.

        Matching methods call it right before augmentation; `fyi` replaces it in the method that it wraps.
        """
        return x

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        """After the optimiser's step: clamps, averages, memories."""

    def alarms(self) -> list[str]:
        """What the log should warn of since the last time, each one line."""
        return []

    def memory(self) -> dict[str, Any]:
        """State that lives neither in the set nor in `modules`: plain data and tensors."""
        return {}

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Take back what `memory` gave."""

    def finish(self, set: SyntheticSet, problem: Problem) -> SyntheticSet:
        """The set that is kept, after the last step."""
        return set

    def soften(self, set: SyntheticSet, problem: Problem) -> SyntheticSet | None:
        """Give any set (random real images) the very kind of soft labels that this method's own set has; None when it has hard ones.

        With it a random subset gets the same help, which is what a fair comparison asks for (DD-Ranking).
        """
        return None

    def figures(self, set: SyntheticSet, problem: Problem) -> dict[str, float]:
        """Further figures of the finished set for the summary (what a mechanism claims)."""
        return {}


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        half = len(pairs) // 2
        ctx.save_for_backward(*pairs[half:])
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, *(grad * g for g in gradients), *(None for _ in gradients)


def surrogate(value: Tensor, gradients: Mapping[Tensor, Tensor]) -> Tensor:
    """A scalar with a given value whose backward pass gives exactly the given gradients.

    For methods that compute their gradient piece by piece in constant memory and still hand the engine a loss.

    Args:
        value: the loss, without graph.
        gradients: the gradient for each parameter.
    """
    return _Surrogate.apply(value, *gradients.keys(), *gradients.values())
