"""What the benchmarks share: the pair of networks, facts about the machine, timing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from limbeck.tasks import Classification
from limbeck.zoo.resnet import ResNet

CLASSES = 100
SHAPE = (3, 32, 32)
TASK = Classification(tuple(str(i) for i in range(CLASSES)))


def facts() -> dict[str, Any]:
    """Numbers that a figure depends on; nothing that names the machine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def resnets(teacher: int = 32, student: int = 8, width: int = 4) -> tuple[ResNet, ResNet]:
    """A teacher and a student of the CIFAR kind, with fixed random weights."""
    torch.manual_seed(0)
    return tuple(ResNet(input_shape=SHAPE, classes=CLASSES, depth=depth, width=width) for depth in (teacher, student))  # type: ignore[return-value]


def spent(act: Callable[[], Any]) -> float:
    """Seconds of process time that a call takes."""
    begin = time.process_time()
    act()
    return time.process_time() - begin


def middle(values: Sequence[float]) -> float:
    """The median."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
