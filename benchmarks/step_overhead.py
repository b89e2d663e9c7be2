"""Cost of one `kd` step: limbeck's engine, limbeck's loss in one's own loop, and two peers, over the same loop written by hand.

    python benchmarks/step_overhead.py [--case mlp|resnet|taps] [--quick] [--device cuda]

Cases: networks of three linear layers, 64 numbers in; resnet32x4 to resnet8x4 on 3x32x32; the same and three feature maps through 1x1
convolutions. Batch 32. Peers: torchdistill's `forward_process` and `post_forward_process`, Model-Optimizer's `convert` and
`compute_kd_loss`. All arms run in one process, a few steps each in turn, with the same cosine schedule.

Checked first: the losses of the first steps (three for mlp, whose later ones hold the gradients of those before; else one) agree between
all arms to 1e-10 in float64 (not for taps) and to 1e-6 in float32. Floor: a framework can cost nothing, so 1.0; beside it the step's
operations at the rate of a matrix product.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import CLASSES, SHAPE, TASK, absent, clock, floor_ms, flops, in_turn, milliseconds, over, parser, resnets, rotated, row, say
from own_steps import Taps, bridges, own_loop, plain_soft
from peer_steps import ALPHA, TEMPERATURE, Job, modelopt_step, torchdistill_step
from peers import Absent, version
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.data.batch import Batch
from limbeck.data.data import Data
from limbeck.data.split import TensorSplit
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.recipe import Training

TARGETS = {"mlp": 1.05, "resnet": 1.01, "taps": 1.02}
BATCH = 32
PEERS = {"torchdistill": (torchdistill_step, "torchdistill"), "modelopt": (modelopt_step, "nvidia-modelopt")}
Arms = dict[str, Callable[[Batch], Tensor]]


class Layers(nn.Module):
    """Three linear layers; no `nn.Sequential`, to which Model-Optimizer would add modules that are then called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def pair(case: str, quick: bool) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """Teacher, student and the shape of a sample."""
    torch.manual_seed(0)
    if case == "mlp":
        return Layers(64), Layers(32), (64,)
    return *(resnets(8, 8, 1) if quick else resnets()), SHAPE


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
        self._begin = clock()

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
        now = clock()
        self.times.append((now[0] - self._begin[0], now[1] - self._begin[1]))
        self.others(len(self.times))
        self._begin = clock()


@dataclass
class Case:
    """One case, made in any dtype.

    Attributes:
        name: "mlp", "resnet" or "taps".
        size: samples of a batch.
        total: steps of the schedule.
        device: where everything is.
        quick: take small networks.
    """

    name: str
    size: int
    total: int
    device: str
    quick: bool

    def __post_init__(self) -> None:
        self.teacher, self.student, self.shape = pair(self.name, self.quick)
        self.pictures, self.labels = torch.randn(8 * self.size, *self.shape), torch.randint(CLASSES, (8 * self.size,))
        self.training = Training(steps=self.total, batch=self.size, optimizer="sgd", lr=0.01, nesterov=False, schedule="cosine", warmup=0)

    @property
    def taps(self) -> bool:
        """Whether feature maps are compared."""
        return self.name == "taps"

    def batches(self, dtype: torch.dtype) -> list[Batch]:
        """Eight batches."""
        split = TensorSplit(self.pictures.to(dtype), self.labels)
        return [split.batch(torch.arange(i * self.size, (i + 1) * self.size)).to(self.device) for i in range(8)]

    def networks(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Copies of teacher and student."""
        return tuple(copy.deepcopy(one).to(self.device, dtype) for one in (self.teacher, self.student))  # type: ignore[return-value]

    def engine(self, dtype: torch.dtype) -> Interleaved:
        """limbeck's program."""
        method = Taps if self.taps else KD
        split = TensorSplit(self.pictures.to(dtype), self.labels)
        data = Data("random", split, split, input_shape=self.shape, classes=TASK.classes)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            teacher, student = self.networks(dtype)
            frozen = FrozenTeacher(teacher, method.teacher_wants)
            made = method(temperature=TEMPERATURE, alpha=ALPHA)
            return Interleaved(made, student, frozen, data, TASK, self.training, device=self.device)
        finally:
            torch.set_default_dtype(before)

    def arms(self, dtype: torch.dtype, total: int) -> tuple[Arms, dict[str, str]]:
        """Steps of the other arms, and why some are missing."""
        wide = (16 if self.quick else 64) if self.taps else 0
        made: Arms = {
            "hand": own_loop(*self.networks(dtype), plain_soft, F.cross_entropy, total, wide),
            "limbeck_loss": own_loop(*self.networks(dtype), TASK.soft_loss, partial(TASK.hard_loss, complete=True), total, wide),
        }
        stages = tuple(f"stages.{i}" for i in range(3)) if self.taps else ()
        widths = bridges([(wide * 2**i, wide * 2**i) for i in range(3)]) if self.taps else nn.ModuleList()
        job = Job(*self.networks(dtype), "taps" if self.taps else "kd", stages, stages, widths.to(self.device, dtype))
        missing = {}
        for name, (make, _) in PEERS.items():
            try:
                step = make(job, total)
            except Absent as why:
                missing[name] = str(why)
            else:
                made[name] = lambda batch, step=step: step(batch.inputs, batch.labels)
        return made, missing


def check(case: Case) -> None:
    """Equal losses of all arms."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        if dtype is torch.float64 and (case.taps or case.device != "cpu"):
            continue  # the projectors are drawn in one dtype; kd's part is compared in float64 in the case resnet
        made, steps = case.batches(dtype), 1 if case.name != "mlp" else min(3, case.total)
        program = case.engine(dtype)
        program.prepare(made)
        program.seen = []
        Loop(program, Plan(case.training, steps)).run()
        for name, step in case.arms(dtype, steps)[0].items():
            for i, ours in enumerate(map(float, program.seen)):
                value = float(step(made[i]))
                assert math.isclose(value, ours, rel_tol=tolerance), f"{name} step {i} in {dtype}: {value} against {ours}"


def measure(name: str, quick: bool, device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a case, and its rows: ratios over the hand-written loop, medians over rounds."""
    rounds, chunk = ((4, 2) if quick else (600, 20)) if name == "mlp" else ((1, 1) if quick else (31, 1))
    case = Case(name, 4 if quick and name != "mlp" else BATCH, (rounds + 1) * chunk, device, quick)
    check(case)
    (steps, missing), made = case.arms(torch.float32, case.total), case.batches(torch.float32)
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in steps}

    def others(number: int) -> None:
        for arm in rotated(steps, number):
            begin = clock()
            for i in range(chunk):
                steps[arm](made[((number - 1) * chunk + i) % 8])
            end = clock()
            times[arm].append((end[0] - begin[0], end[1] - begin[1]))

    program = case.engine(torch.float32)
    program.prepare(made, chunk, others)
    Loop(program, Plan(case.training, case.total)).run()
    times["limbeck"] = program.times
    if rounds > 1:  # in the first one caches are cold, and the engine measures the gradient of each term
        times = {arm: values[1:] for arm, values in times.items()}
    limit = floor_ms(flops(lambda: case.arms(torch.float32, 1)[0]["hand"](made[0])))
    found: dict[str, Any] = {"target": TARGETS[name], "floor": limit, "steps_per_round": chunk}
    rows = []
    for arm in ("hand", "limbeck", "limbeck_loss", *PEERS):
        what = f"{name}: {version(PEERS[arm][1]) + ' (peer)' if arm in PEERS else arm} over the hand-written loop"
        if arm in missing:
            found[arm] = {"absent": missing[arm]}
            rows.append(absent(what, missing[arm]))
            continue
        found[arm] = milliseconds(times[arm], chunk) | over(times, arm, "hand")
        if arm != "hand":
            text = f"1.0; a step of {limit['gflop']} Gflop cannot take less than {limit['ms']} ms, the loop takes {found['hand']['ms']} ms"
            target = None if arm in PEERS else TARGETS[name]
            rows.append(row(what, found[arm]["ratio"], target, floor=text, iqr=found[arm]["iqr"]))
    if name == "resnet":
        rows.append(row(*watching(case, 1 if quick else 3, found)))
    return found, rows


def watching(case: Case, rounds: int, found: dict[str, Any]) -> tuple[str, float]:
    """What it costs when the engine measures the gradient of each term: title and figure."""

    def steps(watch: int) -> Callable[[], object]:
        program = case.engine(torch.float32)
        program.prepare(case.batches(torch.float32))
        return Loop(program, Plan(case.training, 2, watch=watch)).run

    times = in_turn({"plain": lambda: steps(0), "watched": lambda: steps(1)}, rounds)
    found["watched"] = gain = over(times, "watched", "plain")
    return "resnet: a step in which each term's gradient is measured over one without (at most every 50th step)", gain["ratio"]


def main() -> None:
    """Print one line of JSON."""
    options = parser(__doc__, cuda=True)
    options.add_argument("--case", choices=[*TARGETS], action="append")
    given = options.parse_args()
    cases = {case: measure(case, given.quick, given.device) for case in given.case or TARGETS}
    say("step_overhead", given.quick, [one for _, rows in cases.values() for one in rows], **{k: v for k, (v, _) in cases.items()})


if __name__ == "__main__":
    main()
