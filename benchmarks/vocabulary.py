"""A divergence over a large vocabulary, from hidden states to gradients: chunked against plain, in memory and time.

    python benchmarks/vocabulary.py [--quick] [--peer PYTHON] [--repeats 3]

One float32 step: student hidden (N, 256) and output matrix (V, 256), teacher (N, 512) and (V, 512), loss, gradients of the student's two.
Every arm runs in a fresh process, the arms in turn. Memory: what the step adds to the process's resident size at its peak, inputs and a
step of tiny size before it excluded. Time: process CPU seconds of the step, one thread; the median of the rounds' ratios (peers: one
round). Masked: half the positions are prompt; the plain arm and the peers compute them and weigh them zero, limbeck leaves them out.

Checked first, in the same process: each arm's value and gradients on a small case against float64. Afterwards: value and norm of both
gradients of the large case agree between arms. `--peer` is a Python with liger-kernel and trl; what it lacks is left out with a note.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = ((1024, 32768), (512, 151936))
QUICK = ((48, 700),)
WIDTHS = (256, 512)
TARGETS = {"memory": 0.35, "time": 0.8, "time_masked": 0.5}
OWN, PEERS = ("naive", "limbeck"), ("trl", "liger", "liger128")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Arm = Callable[..., Tensor]


def inputs(n: int, v: int, masked: bool, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden and matrix of the student (leaves), of the teacher, and which positions are scored."""
    draw = torch.Generator().manual_seed(0)
    tensors = []
    for width in WIDTHS:
        tensors += [torch.randn(n, width, generator=draw), torch.randn(v, width, generator=draw).mul_(2 / width**0.5)]
    student, matrix, teacher, other = (tensor.to(dtype) for tensor in tensors)
    scored = torch.arange(n) % 2 == 0 if masked else torch.ones(n, dtype=torch.bool)
    return student.requires_grad_(True), matrix.requires_grad_(True), teacher, other, scored


def naive(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
    """All logits at once, as in a plain training script."""
    log_s, log_t = F.log_softmax(student @ matrix.t(), -1), F.log_softmax((teacher @ other.t()).detach(), -1)
    if kind == "forward":
        rows = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    else:
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        rows = sum(0.5 * F.kl_div(log_m, own, reduction="none", log_target=True).sum(-1) for own in (log_s, log_t))  # type: ignore[assignment]
    return (rows * scored).sum() / scored.sum()


def limbeck() -> Arm:
    """`divergence` of laws without the masked rows."""
    from limbeck.losses.vocabulary import Law, divergence

    def arm(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
        laws = Law(student, matrix), Law(teacher, other)
        if not scored.all():
            laws = laws[0][scored], laws[1][scored]
        return divergence(*laws, kind)  # type: ignore[arg-type]

    return arm


def trl() -> Arm:
    """TRL's function on all logits; beta 0 is its forward KL."""
    from trl.experimental.gkd import GKDTrainer

    def arm(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
        z, u = student @ matrix.t(), (teacher @ other.t()).detach()
        labels = torch.where(scored, 0, -100)
        beta = 0.0 if kind == "forward" else 0.5
        return GKDTrainer.generalized_jsd_loss(z[None], u[None], labels=labels[None], beta=beta, reduction="batchmean")

    return arm


def liger(size: int) -> Callable[[], Arm]:
    """Liger's chunked distillation loss, not compiled, soft part only."""

    def made() -> Arm:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        def arm(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
            beta = 0.0 if kind == "forward" else 0.5
            loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False, chunk_size=size)
            return loss(student, matrix, teacher, other, torch.where(scored, 0, -100))

        return arm

    return made


ARMS: dict[str, Callable[[], Arm]] = {"naive": lambda: naive, "limbeck": limbeck, "trl": trl, "liger": liger(1024), "liger128": liger(128)}


def check(arm: Arm, kind: str, masked: bool) -> None:
    """Value and gradients of a small case against float64."""
    got, true = inputs(40, 301, masked), inputs(40, 301, masked, torch.float64)
    value, exact = arm(*got, kind), naive(*true, kind)
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(value, got[:2]), torch.autograd.grad(exact, true[:2])):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-6)


def resident() -> tuple[float, float]:
    """MiB in memory now (where the system tells, else at the peak), and at the peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak, peak
    found = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024


def child(name: str, n: int, v: int, kind: str, masked: bool) -> dict[str, Any]:
    """One arm, one step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        arm = ARMS[name]()
    except ImportError as error:
        return {"absent": str(error).splitlines()[0]}
    check(arm, kind, masked)
    given = inputs(n, v, masked)
    before, _ = resident()
    begin = time.process_time()
    value = arm(*given, kind)
    value.backward()
    seconds = time.process_time() - begin
    norms = [float(tensor.grad.norm()) for tensor in given[:2]]  # type: ignore[union-attr]
    return {"mib": resident()[1] - before, "seconds": seconds, "value": value.item(), "norms": norms}


def spawn(python: str, name: str, n: int, v: int, kind: str, masked: bool) -> dict[str, Any]:
    """`child` in a process of its own."""
    words = [python, __file__, "--arm", name, "--case", str(n), str(v), kind, str(int(masked))]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def case(n: int, v: int, kind: str, masked: bool, peer: str | None, repeats: int) -> dict[str, Any]:
    """All arms in turn, `repeats` rounds; peers, whose imports take long, in the first alone."""
    from common import middle

    pythons = {name: sys.executable for name in OWN} | ({name: peer for name in PEERS} if peer else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for turn in range(repeats):
        for name in sorted(pythons, reverse=turn % 2 > 0):
            if name in OWN or not turn:
                runs[name].append(spawn(pythons[name], name, n, v, kind, masked))
    found: dict[str, Any] = {}
    for name, made in runs.items():
        if "absent" in made[0]:
            found[name] = made[0]
            continue
        for field in ("value", "norms"):
            torch.testing.assert_close(torch.tensor(made[0][field]), torch.tensor(runs["naive"][0][field]), rtol=2e-4, atol=1e-6)
        found[name] = {
            "mib": round(middle([run["mib"] for run in made])),
            "seconds": round(middle([run["seconds"] for run in made]), 2),
            "memory": round(middle([a["mib"] / max(b["mib"], 1e-9) for a, b in zip(made, runs["naive"])]), 3),
            "time": round(middle([a["seconds"] / b["seconds"] for a, b in zip(made, runs["naive"])]), 3),
        }
    return found


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--case", nargs=4)
    options = parser.parse_args()
    if options.arm:
        n, v, kind, masked = options.case
        print(json.dumps(child(options.arm, int(n), int(v), kind, masked == "1")))
        return
    from common import facts

    torch.set_num_threads(1)
    results = {}
    kinds = ("forward",) if options.quick else ("forward", "js")
    for n, v in QUICK if options.quick else SIZES:
        for kind in kinds:
            for masked in (False, True):
                name = f"{kind}_{v}" + ("_masked" if masked else "")
                results[name] = case(n, v, kind, masked, options.peer, 1 if options.quick else options.repeats)
                print(name, results[name], file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "vocabulary", "quick": options.quick, "targets": TARGETS, "cases": results, **facts()}))


if __name__ == "__main__":
    main()
