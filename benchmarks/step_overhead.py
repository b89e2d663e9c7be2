"""Cost of one `kd` step: limbeck's engine, and limbeck's loss in one's own loop, over the same loop written by hand.

    python benchmarks/step_overhead.py [--case mlp|resnet] [--quick]

Arms run in one process, a few steps each in turn; before any timing their losses must agree to one part in a million (the two float32 formulas of KL round differently at 6e-7).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.data.batch import Batch
from limbeck.data.data import Data
from limbeck.data.split import TensorSplit
from limbeck.engine.callbacks import Callback
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.recipe import Training
from limbeck.tasks import Classification
from limbeck.zoo.resnet import ResNet

TARGETS = {"mlp": 1.05, "resnet": 1.01}
BATCH, CLASSES, TEMPERATURE, ALPHA = 32, 100, 4.0, 0.9
TASK = Classification(tuple(str(i) for i in range(CLASSES)))


def pair(case: str) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """Teacher, student and the shape of a sample."""
    torch.manual_seed(0)
    if case == "mlp":
        teacher, student = (
            nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, CLASSES)) for w in (64, 32)
        )
        return teacher, student, (64,)
    shape = (3, 32, 32)
    return ResNet(input_shape=shape, classes=CLASSES, depth=32, width=4), ResNet(input_shape=shape, classes=CLASSES, depth=8, width=4), shape


def own_loop(teacher: nn.Module, student: nn.Module, soft: Callable[..., Tensor], hard: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    """One step of a plain loop with the given two losses."""
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step(batch: Batch) -> Tensor:
        with torch.no_grad():
            target = teacher(batch.inputs)
        logits = student(batch.inputs)
        loss = ALPHA * soft(logits, target, TEMPERATURE) + (1 - ALPHA) * hard(logits, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain_soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) as people write it."""
    logs, target = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return F.kl_div(logs, target, reduction="batchmean") * temperature**2


class Interleaved(KnowledgeProgram):
    """Gets batches made beforehand; every `chunk` steps it hands the turn to the other arms and notes what its own steps took."""

    made: list[Batch]
    chunk = 0
    others: Callable[[int], None]

    def prepare(self, made: list[Batch], chunk: int = 0, others: Callable[[int], None] | None = None) -> None:
        """Set the batches and, for timing, whose turn comes after `chunk` steps."""
        self.made, self.chunk, self.times, self.count = made, chunk, [], 0
        self.others = others or (lambda number: None)
        self._begin = (time.process_time(), time.perf_counter())

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of one pass over those made beforehand."""
        for batch in self.made[start:]:
            if self.chunk and self.count and self.count % self.chunk == 0:
                self.note()
            yield batch
            self.count += 1

    def note(self) -> None:
        """End of this arm's turn."""
        self.times.append((time.process_time() - self._begin[0], time.perf_counter() - self._begin[1]))
        self.others(len(self.times))
        self._begin = (time.process_time(), time.perf_counter())


class Losses(Callback):
    """Collects the loss of every log record."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def log(self, record: dict[str, Any]) -> None:
        """Keep it."""
        if "loss" in record:
            self.seen.append(record["loss"])


def measure(case: str, quick: bool) -> dict[str, Any]:
    """Ratios over the hand-written loop, medians over rounds; figures in milliseconds of process time a step."""
    rounds, chunk = ((3, 2) if quick else (60, 20)) if case == "mlp" else ((2, 1) if quick else (14, 2))
    teacher, student, shape = pair(case)
    inputs, labels = torch.randn(8 * BATCH, *shape), torch.randint(CLASSES, (8 * BATCH,))
    split = TensorSplit(inputs, labels)
    made = [split.batch(torch.arange(i * BATCH, (i + 1) * BATCH)) for i in range(8)]
    data = Data("random", split, split, input_shape=shape, classes=TASK.classes)
    total = (rounds + 1) * chunk
    training = Training(steps=total, batch=BATCH, optimizer="sgd", lr=0.01, nesterov=False, schedule="constant", warmup=0)

    def engine() -> Interleaved:
        return Interleaved(KD(temperature=TEMPERATURE, alpha=ALPHA), copy.deepcopy(student), FrozenTeacher(teacher), data, TASK, training)

    def arms() -> dict[str, Callable[[Batch], Tensor]]:
        return {
            "hand": own_loop(teacher, copy.deepcopy(student), plain_soft, F.cross_entropy),
            "limbeck_loss": own_loop(teacher, copy.deepcopy(student), TASK.soft_loss, TASK.hard_loss),
        }

    seen, program = Losses(), engine()
    program.prepare(made)
    Loop(program, Plan(training, 3, log_every=1), callbacks=[seen]).run()
    for name, step in arms().items():
        for i, ours in enumerate(seen.seen[:3]):
            value = float(step(made[i]))
            assert math.isclose(value, ours, rel_tol=1e-6), f"{name} step {i}: {value} against {ours}"

    steps, times = arms(), {name: [] for name in ("hand", "limbeck_loss")}

    def others(number: int) -> None:
        names = list(steps)
        for name in names[number % 2 :] + names[: number % 2]:
            begin = (time.process_time(), time.perf_counter())
            for i in range(chunk):
                steps[name](made[((number - 1) * chunk + i) % 8])
            times[name].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))

    program = engine()
    program.prepare(made, chunk, others)
    Loop(program, Plan(training, total)).run()
    times["limbeck"] = program.times
    result: dict[str, Any] = {"target": TARGETS[case], "floor": 1.0}
    for name in ("hand", "limbeck_loss", "limbeck"):
        pairs = list(zip(times[name], times["hand"]))
        result[name] = {
            "ms": round(1e3 * statistics.median(t[0] for t in times[name]) / chunk, 4),
            "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 4),
            "ratio_wall": round(statistics.median(a[1] / b[1] for a, b in pairs), 4),
        }
    return result | {"rounds": len(program.times), "steps_per_round": chunk}


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", choices=[*TARGETS], action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {case: measure(case, options.quick) for case in options.case or TARGETS}
    facts = {"python": platform.python_version(), "torch": torch.__version__, "threads": 1, "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"benchmark": "step_overhead", "quick": options.quick, **cases, "torchdistill": None, "why": "arm not written", **facts}))


if __name__ == "__main__":
    main()
