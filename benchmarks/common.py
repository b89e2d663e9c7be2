"""What the benchmarks share: facts about the machine, timing in turn, physical floors, rows of the table, the pair of networks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from limbeck.tasks import Classification
from limbeck.zoo.resnet import ResNet

CLASSES = 100
SHAPE = (3, 32, 32)
TASK = Classification(tuple(str(i) for i in range(CLASSES)))
Clock = tuple[float, float]
"""Seconds of process time and of wall time."""


def parser(page: str | None, *, cuda: bool = False) -> argparse.ArgumentParser:
    """The options that every script has: `--quick`, and `--device` where the script also runs on a GPU. One thread from here on."""
    torch.set_num_threads(1)
    made = argparse.ArgumentParser(description=(page or "").splitlines()[0] if page else None)
    made.add_argument("--quick", action="store_true", help="tiny sizes: checks of equal maths, no figures")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda") if cuda else ("cpu",))
    return made


def say(name: str, quick: bool, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print one line of JSON: the script's rows, its figures, facts about the machine."""
    print(json.dumps({"benchmark": name, "quick": quick, "rows": list(rows), **more, **facts()}))


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


# ---- time ----


def on_gpu() -> bool:
    """Whether this process works on a GPU."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def clock() -> Clock:
    """Process time and wall time now; a GPU's work is waited for, and wall time is then both."""
    if on_gpu():
        torch.cuda.synchronize()
        return time.perf_counter(), time.perf_counter()
    return time.process_time(), time.perf_counter()


def took(act: Callable[[], Any]) -> Clock:
    """Process time and wall time of a call."""
    begin = clock()
    act()
    end = clock()
    return end[0] - begin[0], end[1] - begin[1]


def spent(act: Callable[[], Any]) -> float:
    """Seconds of process time that a call takes; of wall time where a GPU works."""
    return took(act)[0]


def rotated(names: Iterable[str], number: int) -> list[str]:
    """The order of the arms in a round: each comes first equally often, and both directions are taken."""
    listed = list(names)
    turn = number % len(listed)
    order = listed[turn:] + listed[:turn]
    return order if number // len(listed) % 2 == 0 else order[::-1]


def in_turn(arms: Mapping[str, Callable[[], Callable[[], object]]], rounds: int, warm: bool = False) -> dict[str, list[Clock]]:
    """Times of each arm, made anew (untimed) for each round, in rotated order.

    Args:
        arms: name to a maker of what is timed.
        warm: run everything once before the first round.
    """
    if warm:
        for make in arms.values():
            make()()
    times: dict[str, list[Clock]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in rotated(arms, number):
            times[name].append(took(arms[name]()))
    return times


def middle(values: Sequence[float]) -> float:
    """The median."""
    return quantile(values, 0.5)


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


def over(times: Mapping[str, Sequence[Clock]], name: str, base: str) -> dict[str, Any]:
    """Median and interquartile range of an arm's time over another's in the same round: process time, and wall time beside it."""
    ratios = [a[0] / max(b[0], 1e-9) for a, b in zip(times[name], times[base])]
    walls = [a[1] / max(b[1], 1e-9) for a, b in zip(times[name], times[base])]
    spread = [round(quantile(ratios, share), 3) for share in (0.25, 0.75)]
    return {"ratio": round(middle(ratios), 4), "iqr": spread, "ratio_wall": round(middle(walls), 4), "rounds": len(ratios)}


def milliseconds(times: Sequence[Clock], steps: int = 1) -> dict[str, float]:
    """Medians of a step, in milliseconds of process time and of wall time."""
    return {name: round(1e3 * middle([one[side] for one in times]) / steps, 4) for side, name in enumerate(("ms", "ms_wall"))}


# ---- floors ----


def flops(act: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions of a call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        act()
    return int(counter.get_total_flops())


@cache
def matmul_rate(device: str = "cpu", size: int = 1024) -> float:
    """Operations a second that a float32 matrix product reaches here on one thread: the best of several tries."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    a @ b
    return 2 * size**3 / min(spent(lambda: a @ b) for _ in range(12))


@cache
def memory_rate() -> float:
    """Bytes a second that one thread copies in memory (read and written bytes counted), the best of several tries."""
    a = torch.randn(32 * 2**20)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.numel() * a.element_size() / min(spent(lambda: b.copy_(a)) for _ in range(8))


def disk_rate(folder: Path, size: int = 64 * 2**20) -> float:
    """Bytes a second that reach the disk: one file, written and synced, wall time, the best of three."""
    block, best = os.urandom(size), float("inf")
    for number in range(3):
        path = folder / f"rate-{number}"
        begin = time.perf_counter()
        with path.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        best = min(best, time.perf_counter() - begin)
        path.unlink()
    return size / best


def floor_ms(operations: float) -> dict[str, float]:
    """The least time of so many operations: at the rate of a float32 matrix product, measured in this run."""
    rate = matmul_rate("cuda" if on_gpu() else "cpu")
    return {"gflop": round(operations / 1e9, 4), "gflop_a_second": round(rate / 1e9, 1), "ms": round(1e3 * operations / rate, 4)}


# ---- rows ----


def row(
    what: str,
    figure: float | None,
    target: float | None = None,
    *,
    higher: bool = False,
    floor: str = "",
    iqr: Sequence[float] | None = None,
    note: str = "",
) -> dict[str, Any]:
    """A line of the table.

    Args:
        what: what is measured; names a peer's version where one is involved.
        figure: None where nothing could be measured; `note` then says why.
        target: None for a figure without one (a peer's own, or one that only informs).
        higher: whether more is better.
        floor: what physics allows, and how far the figure is from it.
        iqr: quartiles over the rounds.
        note: anything a reader must know.
    """
    met = None if figure is None or target is None else (figure >= target if higher else figure <= target)
    return {"what": what, "figure": figure, "target": target, "higher": higher, "met": met, "floor": floor, "iqr": iqr, "note": note}


def absent(what: str, why: str) -> dict[str, Any]:
    """A line for what could not be run, with the reason."""
    return row(what, None, note=why)
