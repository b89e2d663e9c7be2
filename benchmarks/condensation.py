"""An outer step of condensation against plain loops in the manner of the papers' code, in time and memory.

    python benchmarks/condensation.py [--quick]

Data: random pictures of CIFAR-10's shape, ten images a class, the ConvNet of the papers (three blocks, instance norm). Width, real
samples a step and frequencies are 64, 64 and 2048 in place of the papers' 128, 256 and 4096, so that a step takes seconds on one core. The
measurement of single terms, which the engine makes every fifty steps or more, is off. Distribution matching; gradient matching (two
updates a network, one inner step between); trajectory matching with ten inner steps; NCFM's characteristic functions. Checked first:
every arm computes the same loss and gradient from the same images and weights. Setting up is outside the times; limbeck's arms run
through its engine.

Memory: what two outer steps (of trajectory matching: one) add to the peak of a fresh process; for trajectory matching at 40 inner steps
over 5, ten images in all. Floor: the operations of a step of the plain loop at the rate of a matrix product. The score of a set is
compared with DD-Ranking's in `condensation_score.py`; accuracies are in the evidence files.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import floor_ms, flops, in_turn, milliseconds, over, parser, row, say
from condensation_hand import CLASSES, PER_CLASS, dm_by_hand, dm_loss, gm_by_hand, gm_loss, tm_by_hand
from torch import Tensor
from torch.nn import functional as F

from limbeck import schema
from limbeck.condensation.methods.distribution_matching import DistributionMatching
from limbeck.condensation.methods.gradient_matching import GradientMatching
from limbeck.condensation.methods.ncfm import NCFM
from limbeck.condensation.problem import Problem
from limbeck.condensation.program import CondensationProgram
from limbeck.condensation.unrolling import constant_memory_gradient, trajectory_distance, unroll
from limbeck.data import open_data
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Loop, Plan
from limbeck.engine.session import Session

TARGETS = {"step": 1.0, "characteristic_over_mean": 1.3, "memory": 0.7, "memory_40_over_5": 1.15}


def pose(width: int, per_class: int) -> Problem:
    """The problem on random pictures."""
    torch.manual_seed(0)
    x, y = torch.rand(600, 3, 32, 32), torch.arange(600) % CLASSES
    data = open_data({"train": (x, y), "test": (x[:20], y[:20])})
    inner = schema.Model(model="convnet", args={"width": width, "depth": 3})
    return Problem(data, schema.Condense(per_class=per_class), inner, Session())


def engine(problem: Problem, method: Any, steps: int) -> Callable[[], object]:
    """A ready loop of limbeck's engine."""
    method.prepare(problem)
    made = method.begin(problem)
    program = CondensationProgram(method, made, problem, steps)
    return Loop(program, Plan(program.training, steps, watch=0)).run


def check(problem: Problem, batch: int, method: Any, term: str, loss: Callable[..., Tensor]) -> None:
    """Equal loss and gradient on equal draws."""
    method.prepare(problem)
    made, network = method.begin(problem), problem.network()
    if term == "means":
        network.requires_grad_(False)
    kept, problem.network = problem.network, lambda *a, **k: network  # type: ignore[method-assign]
    torch.manual_seed(1)
    ours = method.losses("set", made, problem, Clock(0, 1, 1))[term]
    problem.network = kept  # type: ignore[method-assign]
    images = made.images.detach().clone().requires_grad_(True)
    torch.manual_seed(1)
    theirs = loss(network, images, problem, batch, problem.real)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(a, b)[0] for a, b in ((ours, made.images), (theirs, images))), rtol=1e-3, atol=1e-5)


def drawing(problem: Problem, frequencies: int) -> Callable[[], object]:
    """The normal numbers of one round of characteristic functions, those of each class."""
    width = problem.anatomy.embedding_shape
    assert width is not None
    return lambda: [torch.randn(frequencies, math.prod(width[1:])) for _ in range(CLASSES)]


def inner(problem: Problem) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """A functional network, images, labels, and the two ends of an expert's stretch."""
    from limbeck.condensation.functional import Functional

    torch.manual_seed(3)
    functional = Functional(problem.network())
    start = functional.flatten(problem.network())
    made = problem.initial("real")
    return functional, made.images.detach().clone().requires_grad_(True), made.labels, start, start + 0.01 * torch.randn_like(start)


def tm_ours(parts: Any, steps: int, constant: bool) -> Tensor:
    """The same with limbeck's parts."""
    functional, images, labels, start, target = parts
    rate = torch.tensor(0.01, requires_grad=True)
    loss_of = lambda weights, k: F.cross_entropy(functional(weights, images), labels)  # noqa: E731
    if constant:
        value, _, (gradient,) = constant_memory_gradient(loss_of, start, target, steps, rate, [images])
        images.grad = gradient
        return value
    loss = trajectory_distance(unroll(loss_of, start, steps, rate)[-1], start, target)
    images.grad = None
    loss.backward()
    return loss.detach()


def peak() -> int:
    """Kibibytes: the greatest resident size since this program began (getrusage would count what the parent held)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matching(kind: str, problem: Problem, width: int, batch: int, steps: int) -> Callable[[], object]:
    """An arm by its name: `distribution` or `gradient`, `_hand` or `_limbeck`."""
    what, whose = kind.split("_")
    if whose == "hand":
        return partial({"distribution": dm_by_hand, "gradient": gm_by_hand}[what], problem, width, batch, steps)
    if what == "distribution":
        return engine(problem, DistributionMatching(batch_real=batch), steps)
    return engine(problem, GradientMatching(batch_real=batch, init="real", outer_loop=2, inner_loop=1, iterations=steps), steps)


def memory(kind: str, steps: int, width: int, batch: int) -> float:
    """Mebibytes that an arm adds to the peak of this process; a tiny one has run before."""
    if "_" in kind:
        matching(kind, pose(4, PER_CLASS), 4, 2, 2)()
        act = matching(kind, pose(width, PER_CLASS), width, batch, steps)
        before = peak()
        act()
    else:
        parts = inner(pose(width, 1))
        tm_ours(parts, 1, kind == "constant")
        before = peak()
        tm_ours(parts, steps, kind == "constant")
    return (peak() - before) / 1024


def saved_memory(kind: str, steps: int, width: int) -> float:
    """Mebibytes that autograd holds at most during one outer step."""
    now = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            now += self.size
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.size

    parts = inner(pose(width, 1))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        tm_ours(parts, steps, kind == "constant")
    return most / 2**20


# ---- all of it ----


def steps_cost(width: int, batch: int, steps: int, rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times of all loops."""
    problem, rows = pose(width, PER_CLASS), []
    check(problem, batch, DistributionMatching(batch_real=batch), "means", dm_loss)
    check(problem, batch, GradientMatching(batch_real=batch, init="real"), "gradients", gm_loss)
    small = inner(pose(width, 1))
    torch.testing.assert_close(tm_by_hand(small, 3), tm_ours(small, 3, False), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tm_by_hand(small, 3), tm_ours(small, 3, True), rtol=1e-4, atol=1e-6)
    found: dict[str, Any] = {}
    parts, inside = inner(problem), 10 if rounds > 1 else 2
    ncfm = {"batch_real": batch, "models": 0, "frequencies": 2048, "iterations": CLASSES * steps}
    groups: dict[str, tuple[dict[str, Callable[[], Callable[[], object]]], int]] = {}
    for what in ("distribution", "gradient"):
        arms = {whose: partial(matching, f"{what}_{whose}", problem, width, batch, steps) for whose in ("hand", "limbeck")}
        groups[what] = arms, steps
    groups["distribution"][0]["characteristic"] = lambda: engine(problem, NCFM(**ncfm), CLASSES * steps)
    groups["trajectory"] = (
        {
            "hand": lambda: partial(tm_by_hand, parts, inside),
            "limbeck": lambda: partial(tm_ours, parts, inside, False),
            "constant": lambda: partial(tm_ours, parts, inside, True),
        },
        1,
    )
    for what, (arms, count) in groups.items():
        times = in_turn(arms, rounds * (3 if what == "distribution" else 1), warm=rounds > 1)  # its steps are short
        limit = floor_ms(flops(arms["hand"]()) / count)
        found[what] = {"floor": limit, **{arm: milliseconds(times[arm], count) | over(times, arm, "hand") for arm in arms}}
        own = found[what]["limbeck"]
        text = (
            f"{limit['gflop']:.0f} Gflop a step: {limit['ms']:.0f} ms; measured {own['ms']:.0f}, by hand {found[what]['hand']['ms']:.0f} ms"
        )
        title = f"outer step of {what} matching{' (10 inner steps)' if what == 'trajectory' else ''} over the papers' loop"
        rows.append(row(title, own["ratio"], TARGETS["step"], floor=text, iqr=own["iqr"]))
        if "characteristic" in arms:
            extra = over(times, "characteristic", "limbeck")
            found["characteristic_over_mean"] = extra
            title = "a round of characteristic functions over a step of means"
            drawn = milliseconds(in_turn({"": lambda: drawing(problem, ncfm["frequencies"])}, rounds, warm=True)[""])["ms"]
            least = 1 + drawn / own["ms"]
            text = f"{least:.2f}: to the step of means only the drawing of the frequencies, {drawn:.0f} ms a round"
            rows.append(row(title, extra["ratio"], TARGETS["characteristic_over_mean"], floor=text, iqr=extra["iqr"]))
        if "constant" in arms:
            extra = found[what]["constant"]
            rows.append(row("the same in constant memory, which computes every inner step twice", extra["ratio"], iqr=extra["iqr"]))
    return found, rows


def memories(width: int, batch: int, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Memory of all loops, in processes of their own."""
    found: dict[str, Any] = {}
    rows = []
    for what in () if quick else ("distribution", "gradient"):
        own, other = (round(_child(f"{what}_{whose}", 2, width, batch), 1) for whose in ("limbeck", "hand"))
        figure = round(own / max(other, 1.0), 3)
        found[f"memory_{what}"] = {"limbeck_mib": own, "hand_mib": other, "ratio": figure}
        text = f"limbeck {own} MiB, by hand {other} MiB"
        rows.append(row(f"peak memory of {what} matching over the papers' loop", figure, TARGETS["memory"], note=text))
    for kind in ("constant", "full"):
        added = [0.0, 0.0] if quick else [_child(kind, n, width, batch) for n in (5, 40)]
        held = [saved_memory(kind, n, width) for n in ((2, 8) if quick else (5, 40))]
        found[f"memory_{kind}"] = {
            "peak_rss_mib": [round(value, 1) for value in added],
            "saved_for_backward_mib": [round(value, 1) for value in held],
            "ratio": round(held[1] / held[0], 3),
            "ratio_rss": round(added[1] / max(added[0], 1e-9), 3),
        }
    title = "memory of trajectory matching (constant) at 40 inner steps over 5"
    text = f"full unrolling: {found['memory_full']['ratio']}"
    rows.append(row(title, found["memory_constant"]["ratio"], TARGETS["memory_40_over_5"], floor="1.0", note=text))
    return found, rows


def _child(kind: str, steps: int, width: int, batch: int) -> float:
    words = [sys.executable, __file__, "--memory", kind, "--steps", str(steps), "--width", str(width), "--batch", str(batch)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print one line of JSON (with --memory: one number)."""
    options = parser(__doc__)
    kinds = [f"{what}_{whose}" for what in ("distribution", "gradient") for whose in ("hand", "limbeck")]
    options.add_argument("--memory", choices=("full", "constant", *kinds))
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--batch", type=int, default=64)
    given = options.parse_args()
    if given.memory:
        print(memory(given.memory, given.steps, given.width, given.batch))
        return
    width, batch = (4, 4) if given.quick else (64, 64)
    found, rows = steps_cost(width, batch, *((2, 1) if given.quick else (2, 5)))
    held, more = memories(width, batch, given.quick)
    say("condensation", given.quick, rows + more, targets=TARGETS, **found, **held)


if __name__ == "__main__":
    main()
