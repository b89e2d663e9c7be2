"""What the engine drives. A wing hands it a program; the engine knows nothing else about the wing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from limbeck.engine.clock import Clock


class Program(Protocol):
    """Something that can be trained, or computed, step by step.

    A program without gradients (a training-free search, mining) returns no optimisers; its `losses` may then be any figures.
    """

    steps_per_epoch: int

    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by name: saved in checkpoints and restored from them."""
        ...

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One optimiser for each turn that updates something."""
        ...

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from number `start` on; a pure function of both, so that resuming needs no state."""
        ...

    def parts(self, batch: Any, count: int) -> Sequence[Any]:
        """The batch cut into `count` parts, for gradient accumulation."""
        ...

    def turns(self, clock: Clock) -> Sequence[str]:
        """Whose turn it is in this step, in order: names of optimisers. Mostly ("student",)."""
        ...

    def losses(self, turn: str, batch: Any, clock: Clock) -> dict[str, Tensor]:
        """The terms of the loss of one turn, by name: scalars that are summed."""
        ...

    def after_step(self, clock: Clock) -> None:
        """Called when all turns of a step are over (moving averages, memories)."""
        ...

    def memory(self) -> dict[str, Any]:
        """State that lives in no module: plain data and tensors."""
        ...

    def restore(self, memory: dict[str, Any]) -> None:
        """Take back what `memory` gave."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on the split that is watched during training; empty when there is none."""
        ...

    def train(self) -> None:
        """Put what is trained into training mode."""
        ...

    def vitals(self) -> list[str]:
        """Alarms about the last batch, each one line (constant output, collapsed entropy); mostly empty."""
        ...


def moving_average(network: nn.Module, training: Any) -> AveragedModel | None:
    """The moving average of a network's weights and buffers that a `training` block asks for (`ema`); None where it asks for none."""
    if training.ema is None:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.ema), use_buffers=True)


def placed(value: Any, device: torch.device) -> Any:
    """The same plain data with all tensors on a device: checkpoints are read on the processor."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: placed(item, device) for name, item in value.items()}
    return [placed(item, device) for item in value] if isinstance(value, list) else value


@dataclass
class Tick:
    """A step without a batch of its own: the program draws what it needs from torch's global generator, which checkpoints restore."""

    index: None = None


class PlainProgram:
    """What most programs leave as it is: one batch in one piece, no memory, no measurement, no alarms. Derive from it and give the rest."""

    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by name."""
        raise NotImplementedError

    def parts(self, batch: Any, count: int) -> Sequence[Any]:
        """The batch in one piece; refuses more: a program that can cut its batch says how."""
        if count == 1:
            return (batch,)
        raise NotImplementedError(f"a batch of {type(self).__name__} is not cut into parts")

    def after_step(self, clock: Clock) -> None:
        """Nothing to do."""

    def memory(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def restore(self, memory: dict[str, Any]) -> None:
        """Nothing to take back."""

    def evaluate(self) -> dict[str, float]:
        """Nothing is measured while it trains."""
        return {}

    def train(self) -> None:
        """Every module into training mode."""
        for module in self.modules().values():
            module.train()

    def vitals(self) -> list[str]:
        """No alarms."""
        return []
