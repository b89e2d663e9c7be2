"""Learning-rate schedules and optimisers, built from a recipe's `training` block.

A schedule is a pure function of the step, so it has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn


class Training(Protocol):
    """The settings that the engine reads; `limbeck.recipe.Training` is the one that people write."""

    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    betas: tuple[float, float]
    schedule: str
    warmup: float
    milestones: tuple[float, ...]
    gamma: float
    clip: float | None
    ema: float | None
    accumulate: int


def factor(training: Training, step: int, total: int) -> float:
    """What the learning rate is multiplied by at a step.

    Args:
        training: `schedule` is "constant", "linear" (to 0), "cosine" (to 0) or "step" (times `gamma` at each share of the
            run in `milestones`); `warmup` is the share of the run in which the rate first grows linearly from near 0.
        step: the step that is about to be made, from 0.
        total: steps of the run.
    """
    warm = int(training.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total - warm)
    if training.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if training.schedule == "linear":
        return 1 - done
    if training.schedule == "step":
        return training.gamma ** sum(step >= share * total for share in training.milestones)
    return 1.0


def make_optimizer(
    training: Training, groups: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]], **changes: Any
) -> torch.optim.Optimizer:
    """A torch optimiser from a `training` block.

    Args:
        training: names the optimiser ("sgd", "adam", "adamw") and its settings.
        groups: parameters, or torch parameter groups; a group's own `lr` or `weight_decay` win.
        changes: settings that replace those of `training` for this optimiser alone (`optimizer`, `lr`, `weight_decay`, `momentum`).
    """

    def value(name: str) -> Any:
        return changes.get(name, getattr(training, name))

    name, lr, decay = value("optimizer"), value("lr"), value("weight_decay")
    groups = list(groups)
    if name == "sgd":
        momentum = value("momentum")
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay, nesterov=training.nesterov and momentum > 0)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, weight_decay=decay, betas=tuple(training.betas))
