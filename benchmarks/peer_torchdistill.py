"""The torchdistill arm of `step_overhead.py`: its own process, its own environment, the hand-written loop beside it.

    PEER/bin/python benchmarks/peer_torchdistill.py [--quick]

PEER is a virtual environment with torch, `pip install --no-deps torchdistill` and what its import needs (numpy, pyyaml, pillow). Its
models and data sets are not used, so torchvision and the like are replaced by empty modules; the class that is timed,
`DistillationBox`, and its `KDLoss` are the published ones. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.machinery
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ABSENT = ("torchvision", "scipy", "pycocotools", "cv2", "matplotlib", "datasets", "timm")
BATCH, CLASSES, TEMPERATURE, ALPHA = 32, 100, 4.0, 0.9


class Blank:
    """Stands for the packages that torchdistill imports and that this arm does not use."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """An empty package for the names in `ABSENT`."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """A module in which every name is an empty class."""
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def nets() -> tuple[nn.Module, nn.Module]:
    """The pair of the case mlp."""
    torch.manual_seed(0)
    widths = (64, 32)
    teacher, student = (nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, CLASSES)) for w in widths)
    return teacher, student


def hand(teacher: nn.Module, student: nn.Module, total: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The plain loop of `step_overhead.py`."""
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    done = 0

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        nonlocal done
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * done / total))
        with torch.no_grad():
            target = F.log_softmax(teacher(inputs) / TEMPERATURE, 1)
        logits = student(inputs)
        soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), target, log_target=True, reduction="batchmean") * TEMPERATURE**2
        loss = ALPHA * soft + (1 - ALPHA) * F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        return loss.detach()

    return step


def box(teacher: nn.Module, student: nn.Module, total: int) -> Callable[[Tensor, Tensor], Tensor]:
    """One step of torchdistill's `DistillationBox` in the order of its examples: forward, then post-forward."""
    from torchdistill.core.distillation import DistillationBox

    where = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
    loss = {"key": "KDLoss", "kwargs": where | {"temperature": TEMPERATURE, "alpha": 1 - ALPHA, "reduction": "batchmean"}}
    term = {"kd": {"criterion": loss, "weight": 1.0}}
    end = {"forward_proc": "forward_batch_only", "wrapper": None}
    config: dict[str, Any] = {
        "num_epochs": 1,
        "teacher": {**end, "sequential": [], "requires_grad": False},
        "student": {**end, "sequential": [], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}},
        "scheduler": {"key": "CosineAnnealingLR", "kwargs": {"T_max": total}, "scheduling_step": 1},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": term, "model_term": {"weight": 0}}},
        "func2extract_model_loss": None,
    }
    made = DistillationBox(teacher.eval(), student, {}, config, torch.device("cpu"), None, False, 1)
    made.pre_epoch_process(epoch=0)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        value = made.forward_process(inputs, labels, None)
        made.post_forward_process(loss=value)
        return value.detach()

    return step


def main() -> None:
    """Equal losses first, then times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    rounds, chunk = (3, 2) if parser.parse_args().quick else (60, 20)
    sys.meta_path.insert(0, Blank())  # type: ignore[arg-type]
    for name in ("datasets", "models", "transforms"):  # the empty ones: torchdistill looks for them in sys.modules
        importlib.import_module(f"torchvision.{name}")
    torch.set_num_threads(1)
    teacher, student = nets()
    inputs, labels = torch.randn(8, BATCH, 64), torch.randint(CLASSES, (8, BATCH))
    total = (rounds + 1) * chunk
    arms = {"hand": hand, "torchdistill": box}
    made = {name: make(copy.deepcopy(teacher), copy.deepcopy(student), total) for name, make in arms.items()}
    for i in range(3):
        values = {name: float(step(inputs[i], labels[i])) for name, step in made.items()}
        assert math.isclose(values["hand"], values["torchdistill"], rel_tol=1e-6), values
    made = {name: make(copy.deepcopy(teacher), copy.deepcopy(student), total) for name, make in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in sorted(arms, reverse=number % 2 > 0):
            begin = time.process_time()
            for i in range(chunk):
                made[name](inputs[i % 8], labels[i % 8])
            times[name].append(time.process_time() - begin)
    ratio = statistics.median(a / b for a, b in zip(times["torchdistill"][1:], times["hand"][1:]))
    ms = {name: round(1e3 * statistics.median(values) / chunk, 4) for name, values in times.items()}
    made_of = {"version": version("torchdistill"), "torch": torch.__version__}
    print(json.dumps({"peer": "torchdistill", **made_of, "ratio": round(ratio, 4), "ms": ms}))


if __name__ == "__main__":
    main()
