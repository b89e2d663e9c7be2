"""A teacher that is asked once: online, from limbeck's store, from tensors in memory, from one file a sample.

    python benchmarks/cached_teacher.py [--quick]

Vision: resnet32x4 to resnet8x4 on 3x32x32, batch 8; what is stored: the logits in float16, their 64 largest, or logits and the last
feature map (256x8x8) in float16. Text: an encoder of 6 layers to one of 2 (width 256, length 128, batch 16) that imitates its last
hidden states (128x256 in float16). A step reads the teacher, makes the student's forward and backward pass and the update.

The bound of the speed-up is 1 + F_T / (3 F_S): forward cost of teacher and student, measured in the same run (and in operations). Reading
alone is measured on a store of 50,000 rows; its floor is the bytes at the speed of a copy in memory. Writing: its floor is the bytes at
the speed of one synced file on this disk. A writer is killed with SIGKILL and resumed: less than one shard of what it was given is lost.
Checked first: what is read is what the teacher said, to half precision.
"""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, SHAPE, TASK, clock, disk_rate, flops, in_turn, memory_rate, middle, milliseconds, parser, resnets, row, say
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.signals.store import Store, StoreWriter

MARKS = {"teacher_fingerprint": "t", "data_fingerprint": "d"}
TARGET = 0.95
Said = dict[str, Tensor]


@dataclass
class Work:
    """A teacher, a student and what one imitates of the other.

    Attributes:
        ask: network and inputs to named outputs.
        loss: outputs of the student and of the teacher, and labels, to a scalar.
    """

    teacher: nn.Module
    student: nn.Module
    inputs: Tensor
    labels: Tensor
    batch: int
    ask: Callable[[nn.Module, Tensor], Said]
    loss: Callable[[Said, Said, Tensor], Tensor]


class Encoder(nn.Module):
    """A text encoder: tokens (B, L) to hidden states (B, L, width)."""

    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(8000, width), nn.Parameter(0.02 * torch.randn(length, width))
        make = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)  # noqa: E731
        self.layers = nn.Sequential(*(make() for _ in range(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states."""
        return self.layers(self.words(tokens) + self.places)


def vision(quick: bool, features: bool) -> Work:
    """The pair of the step benchmarks; with `features` also their last feature maps."""
    teacher, student = resnets(8 if quick else 32, 8, 1 if quick else 4)
    samples, batch = (8, 4) if quick else (64, 8)

    def ask(net: nn.Module, x: Tensor) -> Said:
        last = net.stages(net.stem(x))  # type: ignore[operator]
        return {"logits": net.head(net.pool(last)), **({"map": last} if features else {})}  # type: ignore[operator]

    def loss(mine: Said, theirs: Said, labels: Tensor) -> Tensor:
        own = 0.9 * TASK.soft_loss(mine["logits"], theirs["logits"], 4.0) + 0.1 * TASK.hard_loss(mine["logits"], labels)
        return own + F.mse_loss(mine["map"], theirs["map"]) if features else own

    inputs, labels = torch.randn(samples, *SHAPE), torch.randint(CLASSES, (samples,))
    return Work(teacher.eval(), student.train(), inputs, labels, batch, ask, loss)


def text(quick: bool) -> Work:
    """Six layers and two."""
    torch.manual_seed(0)
    width, length = (16, 8) if quick else (256, 128)
    samples, batch = (8, 4) if quick else (64, 16)
    teacher, student = Encoder(6, width, length), Encoder(2, width, length)
    ask: Any = lambda net, x: {"hidden": net(x)}  # noqa: E731
    loss: Any = lambda mine, theirs, labels: F.mse_loss(mine["hidden"], theirs["hidden"])  # noqa: E731
    return Work(teacher.eval(), student, torch.randint(8000, (samples, length)), torch.zeros(samples), batch, ask, loss)


def writer(
    folder: Path, shapes: dict[str, tuple[int, ...]], samples: int, shard: int, form: str = "float16", k: int | None = None
) -> StoreWriter:
    """A store to be filled."""
    return StoreWriter(folder, **MARKS, samples=samples, signals=shapes, form=form, k=k, shard_size=shard)  # type: ignore[arg-type]


def measure(work: Work, folder: Path, form: str, rounds: int) -> dict[str, Any]:
    """Steps of all arms; shares of the bound; bytes."""
    with torch.no_grad():
        parts = [work.ask(work.teacher, part) for part in work.inputs.split(work.batch)]
    said = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count, classes = len(work.inputs), CLASSES
    made = writer(
        folder / "store", {name: tuple(value.shape[1:]) for name, value in said.items()}, count, 32, form, 64 if form == "topk" else None
    )
    made.write(torch.arange(count), said)
    made.finish()
    store = Store(folder / "store")
    (folder / "files").mkdir()
    for i in range(count):
        torch.save({name: value[i].half() for name, value in said.items()}, folder / "files" / f"{i}.pt")
    size = sum(path.stat().st_size for path in (folder / "files").iterdir()) / count

    def from_store(index: Tensor) -> Said:
        if form == "topk":
            return {"logits": store.dense_logits(index)}
        return store.read(index)

    def from_files(index: Tensor) -> Said:
        rows = [torch.load(folder / "files" / f"{i}.pt") for i in index.tolist()]
        return {name: torch.stack([one[name] for one in rows]).float() for name in said}

    sources: dict[str, Callable[[Tensor], Said]] = {
        "online": lambda index: work.ask(work.teacher, work.inputs[index]),
        "memory": lambda index: {name: value[index] for name, value in said.items()},
        "store": from_store,
        "files": from_files,
    }
    everything = torch.arange(count)
    for name in ("store", "files"):
        got = sources[name](everything)
        for key, value in said.items():
            if form == "topk" and name == "store":
                top = value.topk(min(64, classes)).indices
                torch.testing.assert_close(got[key].softmax(1).gather(1, top), value.softmax(1).gather(1, top), rtol=5e-3, atol=5e-3)
            else:
                torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-3)
    batches = [torch.arange(work.batch), torch.arange(work.batch, 2 * work.batch)]
    arms = {name: _steps(work, source, batches) for name, source in sources.items()}

    def alone(net: nn.Module) -> Callable[[], Callable[[], object]]:
        def act() -> None:
            with torch.no_grad():
                for index in batches:
                    work.ask(net, work.inputs[index])

        return lambda: act

    times = in_turn(
        {**{k: (lambda v=v: v) for k, v in arms.items()}, "teacher": alone(work.teacher), "student": alone(work.student)}, rounds, True
    )
    ms = {name: milliseconds(value, len(batches))["ms"] for name, value in times.items()}
    cpu = {name: [one[0] for one in value] for name, value in times.items()}
    bounds = [1 + t / (3 * s) for t, s in zip(cpu["teacher"], cpu["student"])]
    some = work.inputs[batches[0]]  # with gradients on: without, torch takes a fused path that the counter does not see
    work_of = {side: flops(lambda net=net: work.ask(net, some)) for side, net in (("teacher", work.teacher), ("student", work.student))}
    found: dict[str, Any] = {"ms": ms, "bound_measured": round(middle(bounds), 3)}
    found["bound_flops"] = round(1 + work_of["teacher"] / (3 * work_of["student"]), 3)
    for name in ("memory", "store", "files"):
        gains = [a / b for a, b in zip(cpu["online"], cpu[name])]
        shares = [gain / bound for gain, bound in zip(gains, bounds)]
        found[name] = {"speedup": round(middle(gains), 3), "share_of_bound": round(middle(shares), 3)}
        found[name]["iqr"] = [round(sorted(shares)[len(shares) // 4], 3), round(sorted(shares)[-1 - len(shares) // 4], 3)]
    return found | {"bytes_per_sample": store.bytes_per_sample, "bytes_per_sample_in_files": round(size)}


def _steps(work: Work, source: Callable[[Tensor], Said], batches: list[Tensor]) -> Callable[[], object]:
    """Steps of a copy of the student with one source of the teacher's outputs."""
    student = copy.deepcopy(work.student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

    def act() -> None:
        for index in batches:
            with torch.no_grad():
                theirs = source(index)
            work.loss(work.ask(student, work.inputs[index]), theirs, work.labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()

    return act


# ---- writing, reading, killing ----


def large(folder: Path, count: int, batch: int) -> dict[str, Any]:
    """Writing and reading of many rows of 100 logits, and of one file a row."""
    made, rows = writer(folder / "many", {"logits": (CLASSES,)}, count, 4096), torch.randn(count, CLASSES)
    begin = clock()
    for part in torch.arange(count).split(512):
        made.write(part, {"logits": rows[part]})
    made.finish()
    end = clock()
    few = min(count, 2000)
    (folder / "single").mkdir()
    begin_files = time.perf_counter()
    for i in range(few):
        torch.save(rows[i].half(), folder / "single" / f"{i}.pt")
    files = time.perf_counter() - begin_files
    store = Store(folder / "many")
    picks = [torch.randint(few, (batch,)) for _ in range(200)]

    def act_files() -> None:
        for pick in picks[:20]:
            torch.stack([torch.load(folder / "single" / f"{i}.pt") for i in pick.tolist()])

    times = in_turn({"store": lambda: lambda: [store.signals(pick) for pick in picks], "files": lambda: act_files}, 5, warm=True)
    read = {"store": milliseconds(times["store"], len(picks))["ms"], "files": milliseconds(times["files"], 20)["ms"]}
    return {
        "rows": count,
        "rows_written_per_second": round(count / (end[1] - begin[1])),
        "rows_written_per_second_cpu": round(count / max(end[0] - begin[0], 1e-9)),
        "rows_written_per_second_in_files": round(few / files),
        "disk_rows_per_second": round(disk_rate(folder) / store.bytes_per_sample),
        "read_ms_per_batch": read,
        "read_floor_ms": round(1e3 * 2 * batch * store.bytes_per_sample / memory_rate(), 6),
    }


def endless(folder: str) -> None:
    """Fill a store slowly and say after each batch how many rows were given; for the parent to kill."""
    made = writer(Path(folder), {"logits": (CLASSES,)}, 10**6, 100)
    for part in torch.arange(10**6).split(7):
        made.write(part, {"logits": part[:, None].float().expand(-1, CLASSES) / 1000})
        print(int(part[-1]) + 1, flush=True)


def killed(folder: Path, after: int) -> dict[str, int]:
    """Rows that a SIGKILL cost."""
    child = subprocess.Popen([sys.executable, __file__, "--endless", str(folder / "killed")], stdout=subprocess.PIPE, text=True)
    given = 0
    assert child.stdout is not None
    for line in child.stdout:
        given = int(line)
        if given >= after:
            break
    child.send_signal(signal.SIGKILL)
    given = max([given, *(int(line) for line in child.stdout.read().split())])
    child.wait()
    again = writer(folder / "killed", {"logits": (CLASSES,)}, 10**6, 100)
    lost = given - again.next_index
    assert lost < 100, (given, again.next_index)
    return {"rows_given": given, "rows_lost": max(lost, 0), "shard": 100}


def rows_of(cases: dict[str, dict[str, Any]], many: dict[str, Any], dead: dict[str, int]) -> list[dict[str, Any]]:
    """Lines of the table."""
    lines = []
    for name, found in cases.items():
        own, files = found["store"], found["files"]
        text_ = f"bound {found['bound_measured']} (in operations {found['bound_flops']}); reached {own['speedup']}"
        note = f"{found['bytes_per_sample']} bytes a sample; tensors in memory {found['memory']['share_of_bound']}"
        what = f"{name}: speed-up of a step from the store, as a share of the bound"
        lines.append(row(what, own["share_of_bound"], TARGET, higher=True, floor=text_, iqr=own["iqr"], note=note))
        note = f"{found['bytes_per_sample_in_files']} bytes a sample"
        lines.append(
            row(f"{name}: the same from one file a sample", files["share_of_bound"], None, higher=True, iqr=files["iqr"], note=note)
        )
    read = many["read_ms_per_batch"]
    text_ = f"{many['read_floor_ms']} ms: the bytes at the speed of a copy in memory"
    note = f"one file a sample: {read['files']} ms"
    lines.append(row("reading a batch of 8 rows of 100 logits, milliseconds", read["store"], None, floor=text_, note=note))
    text_ = f"{many['disk_rows_per_second']} rows: one synced file at the disk's speed"
    note = f"one file a sample, not synced: {many['rows_written_per_second_in_files']}"
    lines.append(
        row("rows of 100 logits written a second (wall time)", many["rows_written_per_second"], None, higher=True, floor=text_, note=note)
    )
    note = f"killed after {dead['rows_given']} rows"
    lines.append(
        row("rows lost by SIGKILL while writing, in shards", round(dead["rows_lost"] / dead["shard"], 2), 1.0, floor="0", note=note)
    )
    return lines


def main() -> None:
    """Print one line of JSON."""
    options = parser(__doc__)
    options.add_argument("--endless")
    given = options.parse_args()
    if given.endless:
        endless(given.endless)
        return
    rounds = 1 if given.quick else 21
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dead = killed(folder, 150 if given.quick else 2000)
        cases: dict[str, dict[str, Any]] = {}
        forms = {
            "logits, float16": ("float16", False),
            "logits, top 64": ("topk", False),
            "logits and feature map, float16": ("float16", True),
        }
        for what, (form, features) in list(forms.items())[1 if given.quick else 0 :]:
            (folder / what).mkdir()
            cases[what] = measure(vision(given.quick, features), folder / what, form, rounds)
        (folder / "text").mkdir()
        cases["hidden states of a text encoder, float16"] = measure(text(given.quick), folder / "text", "float16", rounds)
        many = large(folder, 1000 if given.quick else 50000, 8)
    say("cached_teacher", given.quick, rows_of(cases, many, dead), cases=cases, many=many, killed=dead)


if __name__ == "__main__":
    main()
