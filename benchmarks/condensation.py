"""An outer step of condensation against plain loops in the manner of the papers' code, and the memory of trajectory matching.

    python benchmarks/condensation.py [--quick]

Data: random pictures of CIFAR-10's shape, ten images a class, the ConvNet of the papers (three blocks, instance norm). Width, real
samples a step and frequencies are 64, 64 and 2048 in place of the papers' 128, 256 and 4096, so that a step takes seconds on one core. The
measurement of single terms, which the engine makes every fifty steps or more, is off. Checked first: every arm computes the same loss
from the same images and weights. Setting up is outside the times; limbeck's arms run through its engine.

Memory: what an outer step of trajectory matching adds to the peak of a fresh process, at 40 inner steps over 5, ten images in all.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import facts, middle, spent
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import schema
from limbeck.condensation.methods.distribution_matching import DistributionMatching
from limbeck.condensation.methods.ncfm import NCFM
from limbeck.condensation.problem import Problem
from limbeck.condensation.program import CondensationProgram
from limbeck.condensation.unrolling import constant_memory_gradient, trajectory_distance, unroll
from limbeck.data import open_data
from limbeck.engine.loop import Loop, Plan
from limbeck.engine.session import Session
from limbeck.zoo.convnet import ConvNet

CLASSES, PER_CLASS = 10, 10
TARGETS = {"distribution": 1.0, "trajectory": 1.0, "characteristic_over_mean": 1.3, "memory_40_over_5": 1.15}


def pose(width: int, per_class: int) -> Problem:
    """The problem on random pictures."""
    torch.manual_seed(0)
    x, y = torch.rand(600, 3, 32, 32), torch.arange(600) % CLASSES
    data = open_data({"train": (x, y), "test": (x[:20], y[:20])})
    inner = schema.Model(model="convnet", args={"width": width, "depth": 3})
    return Problem(data, schema.Condense(per_class=per_class), inner, Session())


# ---- distribution matching ----


def dm_loss(network: nn.Module, images: Tensor, problem: Problem, batch: int, real: Callable[[int, int], Tensor]) -> Tensor:
    """One class after the other, as in the released code."""
    embed = lambda x: network.pool(network.stages(network.stem(x)))  # noqa: E731
    loss = torch.zeros(())
    for c in range(CLASSES):
        output_real = embed(real(c, batch)).detach()
        output_syn = embed(images[c * PER_CLASS : (c + 1) * PER_CLASS])
        loss = loss + ((output_real.mean(0) - output_syn.mean(0)) ** 2).sum()
    return loss


def dm_by_hand(problem: Problem, width: int, batch: int, steps: int) -> Tensor:
    """The plain loop; the images at its end."""
    images = problem.initial("real").images.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([images], lr=1.0, momentum=0.5)
    for _ in range(steps):
        network = ConvNet((3, 32, 32), CLASSES, width=width, depth=3).train()
        for parameter in network.parameters():
            parameter.requires_grad = False
        loss = dm_loss(network, images, problem, batch, problem.real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return images


def engine(problem: Problem, method: Any, steps: int) -> Callable[[], object]:
    """A ready loop of limbeck's engine."""
    method.prepare(problem)
    made = method.begin(problem)
    program = CondensationProgram(method, made, problem, steps)
    return Loop(program, Plan(program.training, steps, watch=0)).run


def check_dm(problem: Problem, batch: int) -> None:
    """Equal loss and gradient on equal draws."""
    method = DistributionMatching(batch_real=batch)
    made = method.begin(problem)
    network = problem.network().requires_grad_(False)
    kept, problem.network = problem.network, lambda *a, **k: network  # type: ignore[method-assign]
    torch.manual_seed(1)
    ours = method.losses("set", made, problem, None)["means"]  # type: ignore[arg-type]
    problem.network = kept  # type: ignore[method-assign]
    images = made.images.detach().clone().requires_grad_(True)
    torch.manual_seed(1)
    theirs = dm_loss(network, images, problem, batch, problem.real)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(a, b)[0] for a, b in ((ours, made.images), (theirs, images))), rtol=1e-3, atol=1e-6)


# ---- trajectory matching ----


def inner(problem: Problem) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """A functional network, images, labels, and the two ends of an expert's stretch."""
    from limbeck.condensation.functional import Functional

    torch.manual_seed(3)
    functional = Functional(problem.network())
    start = functional.flatten(problem.network())
    made = problem.initial("real")
    return functional, made.images.detach().clone().requires_grad_(True), made.labels, start, start + 0.01 * torch.randn_like(start)


def tm_by_hand(parts: Any, steps: int) -> Tensor:
    """The papers' loop: slices of a flat vector put into the network, gradients with their graph, one step after another."""
    functional, images, labels, start, target = parts
    names, shapes = functional.names, functional.shapes
    weights = [start.detach().requires_grad_(True)]
    rate = torch.tensor(0.01, requires_grad=True)
    for _ in range(steps):
        offset, named = 0, {}
        for name, shape in zip(names, shapes):
            named[name] = weights[-1][offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
        loss = F.cross_entropy(torch.func.functional_call(functional.network, named, (images,)), labels)
        gradient = torch.autograd.grad(loss, weights[-1], create_graph=True)[0]
        weights.append(weights[-1] - rate * gradient)
    loss = F.mse_loss(weights[-1], target, reduction="sum") / F.mse_loss(start, target, reduction="sum")
    images.grad = None
    loss.backward()
    return loss.detach()


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


def memory(kind: str, steps: int, width: int) -> float:
    """Mebibytes that one outer step adds to the peak of this process."""
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


def in_turn(arms: dict[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm, made anew for each round, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in sorted(arms, reverse=number % 2 > 0):
            times[name].append(spent(arms[name]()))
    return times


def ratio(times: dict[str, list[float]], own: str, other: str) -> float:
    """The median of the paired ratios."""
    return round(middle([a / b for a, b in zip(times[own], times[other])]), 3)


def measure(width: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    problem = pose(width, PER_CLASS)
    check_dm(problem, batch)
    small = inner(pose(width, 1))
    torch.testing.assert_close(tm_by_hand(small, 3), tm_ours(small, 3, False), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tm_by_hand(small, 3), tm_ours(small, 3, True), rtol=1e-4, atol=1e-6)
    ncfm = {"batch_real": batch, "models": 0, "frequencies": 2048, "iterations": CLASSES * steps}
    times = in_turn(
        {
            "by_hand": lambda: partial(dm_by_hand, problem, width, batch, steps),
            "limbeck": lambda: engine(problem, DistributionMatching(batch_real=batch), steps),
            "characteristic": lambda: engine(problem, NCFM(**ncfm), CLASSES * steps),
        },
        rounds,
    )
    inside = 10
    parts = inner(problem)
    tm = in_turn(
        {
            "by_hand": lambda: partial(tm_by_hand, parts, inside),
            "limbeck": lambda: partial(tm_ours, parts, inside, False),
            "constant": lambda: partial(tm_ours, parts, inside, True),
        },
        rounds,
    )
    result: dict[str, Any] = {
        "distribution": {"ratio": ratio(times, "limbeck", "by_hand"), "seconds_a_step": round(middle(times["limbeck"]) / steps, 3)},
        "characteristic_over_mean": {"ratio": ratio(times, "characteristic", "limbeck")},
        "trajectory": {"ratio": ratio(tm, "limbeck", "by_hand"), "seconds_a_step": round(middle(tm["limbeck"]), 3)},
        "trajectory_constant_memory": {"ratio": ratio(tm, "constant", "by_hand")},
    }
    for kind in ("constant", "full"):
        added = [_child(kind, n, width) for n in (5, 40)]
        held = [saved_memory(kind, n, width) for n in (5, 40)]
        result[f"memory_{kind}"] = {
            "peak_rss_mib": [round(value, 1) for value in added],
            "saved_for_backward_mib": [round(value, 1) for value in held],
            "ratio": round(held[1] / held[0], 3),
            "ratio_rss": round(added[1] / max(added[0], 1e-9), 3),
        }
    return result


def _child(kind: str, steps: int, width: int) -> float:
    words = [sys.executable, __file__, "--memory", kind, "--steps", str(steps), "--width", str(width)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print one line of JSON (with --memory: one number)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", choices=("full", "constant"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(memory(options.memory, options.steps, options.width))
        return
    found = measure(4, 4, 1, 1) if options.quick else measure(64, 64, 2, 5)
    print(json.dumps({"benchmark": "condensation", "quick": options.quick, "targets": TARGETS, **found, **facts()}))


if __name__ == "__main__":
    main()
