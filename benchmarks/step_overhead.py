"""Cost of one `kd` step: limbeck's engine, and limbeck's loss in one's own loop, over the same loop written by hand.

    python benchmarks/step_overhead.py [--case mlp|resnet|taps] [--quick] [--peer PATH]

Arms run in one process, a few steps each in turn, all with the same cosine schedule. Before any timing the losses of the first steps
(three for mlp, whose later ones hold the gradients of those before; else one) must agree: to 1e-10 in float64 (not for taps) and to
1e-6 in float32. `--peer` is the Python of an environment with torchdistill (see `peer_torchdistill.py`); its ratio is over the same
hand-written loop in its own process.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import CLASSES, SHAPE, TASK, facts, resnets
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.data.batch import Batch
from limbeck.data.data import Data
from limbeck.data.split import TensorSplit
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.distiller import Pair
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.recipe import Training
from limbeck.signals.signals import Signals

TARGETS = {"mlp": 1.05, "resnet": 1.01, "taps": 1.02}
BATCH, TEMPERATURE, ALPHA = 32, 4.0, 0.9
Two = Callable[..., Tensor]


def pair(case: str) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """Teacher, student and the shape of a sample."""
    torch.manual_seed(0)
    if case == "mlp":
        teacher, student = (
            nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, CLASSES)) for w in (64, 32)
        )
        return teacher, student, (64,)
    teacher, student = resnets()
    return teacher, student, SHAPE


@dataclass
class Taps(KD):
    """kd and the mean squared distance of three feature maps, the student's through 1x1 convolutions."""

    student_wants: ClassVar[tuple[str, ...]] = ("logits", "stages")
    teacher_wants: ClassVar[tuple[str, ...]] = ("logits", "stages")

    def setup(self, pair: Pair) -> None:
        """One convolution a stage."""
        sides = zip(pair.student_signals.stages, pair.teacher_signals.stages)
        self.parts["bridges"] = bridges([(mine.shape[1], theirs.shape[1]) for mine, theirs in sides])

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`kl`, `ce`, `taps`."""
        rows = zip(self.parts["bridges"], student.stages, teacher.stages)
        return {**super().loss(batch, student, teacher, clock), "taps": sum(F.mse_loss(one(mine), theirs) for one, mine, theirs in rows)}


def bridges(widths: list[tuple[int, int]]) -> nn.ModuleList:
    """1x1 convolutions, the same each time."""
    torch.manual_seed(1)
    return nn.ModuleList(nn.Conv2d(mine, theirs, 1, bias=False) for mine, theirs in widths)


def own_loop(teacher: nn.Module, student: nn.Module, soft: Two, hard: Two, total: int, taps: bool) -> Callable[[Batch], Tensor]:
    """One step of a plain loop with the given two losses."""
    teacher.eval().requires_grad_(False)
    student.train()
    parameters, told, said, done = list(student.parameters()), [], [], 0
    if taps:
        for model, kept in ((teacher, told), (student, said)):
            for stage in list(model.stages):
                stage.register_forward_hook(lambda module, given, output, kept=kept: kept.append(output))
        projectors = bridges([(64 * 2**i, 64 * 2**i) for i in range(3)]).to(parameters[0].dtype)
        parameters += projectors.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step(batch: Batch) -> Tensor:
        nonlocal done
        told.clear(), said.clear()
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * done / total))
        with torch.no_grad():
            target = teacher(batch.inputs)
        logits = student(batch.inputs)
        loss = ALPHA * soft(logits, target, TEMPERATURE) + (1 - ALPHA) * hard(logits, batch.labels)
        if taps:
            loss = loss + sum(F.mse_loss(one(mine), theirs) for one, mine, theirs in zip(projectors, said, told))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return loss.detach()

    return step


def plain_soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) in torch's own words."""
    logs, target = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return F.kl_div(logs, target, log_target=True, reduction="batchmean") * temperature**2


class Interleaved(KnowledgeProgram):
    """Gets batches made beforehand; every `chunk` steps it hands the turn to the other arms and notes what its own steps took."""

    made: list[Batch]
    chunk = 0
    others: Callable[[int], None]

    def prepare(self, made: list[Batch], chunk: int = 0, others: Callable[[int], None] | None = None) -> None:
        """Set the batches and, for timing, whose turn comes after `chunk` steps."""
        self.made, self.chunk, self.times, self.count = made, chunk, [], 0
        self.seen: list[Tensor] | None = None
        self.others = others or (lambda number: None)
        self._begin = (time.process_time(), time.perf_counter())

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of one pass over those made beforehand."""
        for batch in self.made[start:]:
            if self.chunk and self.count and self.count % self.chunk == 0:
                self.note()
            yield batch
            self.count += 1

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The method's terms; their sum is kept when the arms are compared."""
        terms = super().losses(turn, batch, clock)
        if self.seen is not None:
            self.seen.append(sum(value.detach() for value in terms.values()))
        return terms

    def note(self) -> None:
        """End of this arm's turn."""
        self.times.append((time.process_time() - self._begin[0], time.perf_counter() - self._begin[1]))
        self.others(len(self.times))
        self._begin = (time.process_time(), time.perf_counter())


def measure(case: str, quick: bool) -> dict[str, Any]:
    """Ratios over the hand-written loop, medians over rounds; figures in milliseconds of process time a step."""
    rounds, chunk = ((3, 2) if quick else (60, 20)) if case == "mlp" else ((1, 1) if quick else (3, 1))
    size = 4 if quick and case != "mlp" else BATCH
    taps, total = case == "taps", (rounds + 1) * chunk
    first_teacher, first_student, shape = pair(case)
    pictures, labels = torch.randn(8 * size, *shape), torch.randint(CLASSES, (8 * size,))
    training = Training(steps=total, batch=size, optimizer="sgd", lr=0.01, nesterov=False, schedule="cosine", warmup=0)

    def sides(dtype: torch.dtype) -> tuple[list[Batch], Callable[[], Interleaved], Callable[[int], dict[str, Callable[[Batch], Tensor]]]]:
        split = TensorSplit(pictures.to(dtype), labels)
        made = [split.batch(torch.arange(i * size, (i + 1) * size)) for i in range(8)]
        data = Data("random", split, split, input_shape=shape, classes=TASK.classes)
        method = Taps if taps else KD

        def two() -> tuple[nn.Module, nn.Module]:
            return copy.deepcopy(first_teacher).to(dtype), copy.deepcopy(first_student).to(dtype)

        def engine() -> Interleaved:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                teacher, student = two()
                frozen = FrozenTeacher(teacher, method.teacher_wants)
                return Interleaved(method(temperature=TEMPERATURE, alpha=ALPHA), student, frozen, data, TASK, training)
            finally:
                torch.set_default_dtype(before)

        def arms(total: int) -> dict[str, Callable[[Batch], Tensor]]:
            return {
                "hand": own_loop(*two(), plain_soft, F.cross_entropy, total, taps),
                "limbeck_loss": own_loop(*two(), TASK.soft_loss, TASK.hard_loss, total, taps),
            }

        return made, engine, arms

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        if taps and dtype is torch.float64:
            continue  # the projectors are drawn in one dtype; kd's part is compared in float64 in the case resnet
        made, engine, arms = sides(dtype)
        steps = 1 if case != "mlp" else min(3, total)
        program = engine()
        program.prepare(made)
        program.seen = []
        Loop(program, Plan(training, steps)).run()
        for name, step in arms(steps).items():
            for i, ours in enumerate(map(float, program.seen)):
                value = float(step(made[i]))
                assert math.isclose(value, ours, rel_tol=tolerance), f"{name} step {i} in {dtype}: {value} against {ours}"

    steps, times = arms(total), {name: [] for name in ("hand", "limbeck_loss")}

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
    parser.add_argument("--peer", help="the Python of an environment with torchdistill")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {case: measure(case, options.quick) for case in options.case or TARGETS}
    peer: dict[str, Any] = {"torchdistill": None, "why": "no --peer"}
    if options.peer:
        command = [options.peer, str(Path(__file__).with_name("peer_torchdistill.py")), *(["--quick"] if options.quick else [])]
        peer = {"torchdistill": json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)}
    print(json.dumps({"benchmark": "step_overhead", "quick": options.quick, **cases, **peer, **facts()}))


if __name__ == "__main__":
    main()
