"""A divergence over a large vocabulary, from hidden states to gradients: chunked against plain and three peers, in memory and time.

    python benchmarks/vocabulary.py [--quick] [--repeats 3] [--device cuda]

One step: student hidden (N, 256) and output matrix (V, 256), teacher (N, 512) and (V, 512) in float32, loss, gradients of the student's
two (on a GPU 2048 and 4096 in bfloat16). Forward KL, reverse KL, Jensen-Shannon, forward KL to stored top-64 tokens (see
`vocabulary_arms.py`); 0, 50 or 80 % of the positions are prompt: the plain arm and the peers compute them and weigh them zero, limbeck
leaves them out. Every step runs in a fresh process (forked from one that has imported the arm), the arms in turn. Memory: what the step
adds to the process's resident size at its peak (a GPU: to what is allocated), inputs and a step of tiny size before it excluded. Time:
process CPU seconds of the step, one thread (a GPU: the median of ten steps after three); the median of the rounds' ratios (peers: one
round, at 0 and 50 %, of the larger size at 0).

Checked first, in the same process: each arm's value and gradients on a small case against float64; the errors are in the results.
Afterwards: value and norm of both gradients of the large case agree between arms. Floors: 2 N V (H_T + 3 H_S) operations for the scored
positions at the rate of a matrix product; the two gradients in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peers import Absent
from vocabulary_arms import ARMS, TITLES, TOP, VALUELESS, Arm, Inputs, lacking, made, naive

SIZES = {"cpu": ((1024, 32768), (512, 151936)), "cuda": ((1024, 128256), (4096, 128256), (8192, 128256), (8192, 262144))}
WIDTHS = {"cpu": (256, 512), "cuda": (2048, 4096)}
KINDS = ("forward", "reverse", "js", "top64")
MASKS = (0, 50, 80)
TARGETS = {"memory": 0.35, "time": 0.8, "time_masked": 0.5}


def grid(device: str, quick: bool) -> list[tuple[int, int, str, int]]:
    """(N, V, kind, per cent of prompt); the larger size, which takes ten times as long, only where peers publish figures."""
    if quick:
        return [(48, 700, "forward", 50), (48, 700, "top64", 0)]
    small, *large = SIZES[device]
    few = [(*small, kind, mask) for kind in KINDS for mask in MASKS]
    return few + [(*size, kind, mask) for size in large for kind, mask in (("forward", 0), ("forward", 50), ("js", 0))]


def inputs(n: int, v: int, kind: str, mask: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """Hidden and matrix of the student (leaves), of the teacher (or its ids and log-probabilities), and which positions are scored."""
    draw = torch.Generator().manual_seed(0)
    tensors = []
    for width in WIDTHS[device]:
        tensors += [torch.randn(n, width, generator=draw), torch.randn(v, width, generator=draw).mul_(2 / width**0.5)]
    student, matrix, teacher, other = (tensor.to(device, dtype) for tensor in tensors)
    scored = torch.arange(n, device=device) % 100 >= mask if n >= 100 else torch.arange(n, device=device) % 10 >= mask // 10
    if kind == "top64":
        top = [torch.log_softmax(part @ other.t(), -1).topk(min(TOP, v)) for part in teacher.split(64)]
        teacher, other = torch.cat([one.indices for one in top]), torch.cat([one.values for one in top])
    return student.requires_grad_(True), matrix.requires_grad_(True), teacher, other, scored


def check(arm: Arm, name: str, kind: str, mask: int) -> dict[str, float]:
    """Value and gradients of a small case against float64: the relative errors."""
    got, true = inputs(40, 301, kind, mask), inputs(40, 301, kind, mask, torch.float64)
    if kind == "top64":  # both from the same stored numbers
        got = (*got[:2], true[2], true[3].float(), got[4])
    value, exact = arm(*got, kind), naive(*true, kind)
    if (name, kind) not in VALUELESS:
        torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=1e-6)
    worst = 0.0
    for a, b in zip(torch.autograd.grad(value, got[:2]), torch.autograd.grad(exact, true[:2])):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-6)
        worst = max(worst, float((a.double() - b).abs().max() / b.abs().max()))
    return {"value_error": float((value.double() - exact).detach().abs() / exact.detach().abs()), "gradient_error": worst}


def resident() -> tuple[float, float]:
    """MiB in memory now (where the system tells, else at the peak), and at the peak so far; of the GPU where there is work on it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak, peak
    found = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024


@cache
def served(name: str) -> Served:
    """The one process of an arm."""
    return Served(name)


def child(name: str, n: int, v: int, kind: str, mask: int, device: str) -> dict[str, Any]:
    """One arm, one step (a GPU: several, of which the median)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        arm = made(name, kind)
    except Absent as why:
        return {"absent": str(why)}
    errors = check(arm, name, kind, mask) if device == "cpu" else {}
    given = inputs(n, v, kind, mask, torch.float32 if device == "cpu" else torch.bfloat16, device)
    before, seconds = resident()[0], []
    for _ in range(1 if device == "cpu" else 13):
        for leaf in given[:2]:
            leaf.grad = None
        begin = _now(device)
        value = arm(*given, kind)
        value.backward()
        seconds.append(_now(device) - begin)
    norms = [float(tensor.grad.norm()) for tensor in given[:2]]  # type: ignore[union-attr]
    middle = sorted(seconds[3:] or seconds)[len(seconds[3:] or seconds) // 2]
    return {"mib": resident()[1] - before, "seconds": middle, "value": value.item(), "norms": norms, **errors}


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Served:
    """An arm's process, which imports once and forks for each step that it measures: an import takes longer than most steps."""

    def __init__(self, name: str) -> None:
        words = [sys.executable, __file__, "--arm", name]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *given: Any) -> dict[str, Any]:
        """What a fresh child measured."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith('{"'):
                return json.loads(line)
        raise SystemExit(f"an arm's process ended (exit code {self.process.wait()})")


def serve(name: str) -> None:
    """Read cases, fork, measure; on a GPU, which no child may share after a fork, a new process for each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ready = False
    for line in sys.stdin:
        given = json.loads(line)
        if given[-1] != "cpu":
            subprocess.run([sys.executable, __file__, "--once", line], check=True)
            continue
        if not ready:
            with contextlib.suppress(Absent):
                made(name, "forward")
            ready = True
        if (number := os.fork()) == 0:
            print(json.dumps(child(*given)), flush=True)
            os._exit(0)
        if os.waitpid(number, 0)[1]:
            raise SystemExit(1)


def case(n: int, v: int, kind: str, mask: int, repeats: int, device: str, quick: bool) -> dict[str, Any]:
    """All arms in turn, `repeats` rounds; peers in the first alone, and not where most is masked, which changes nothing for them."""
    from common import middle

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    peers_to = 50 if v < 10**5 else 0
    measure = child if quick else lambda name, *given: served(name)(name, *given)
    for turn in range(repeats):
        for name in sorted(ARMS, reverse=turn % 2 > 0):
            if (why := lacking(name, kind)) is not None:
                runs[name] = [{"absent": why}]
            elif name not in TITLES or (not turn and mask <= peers_to):
                runs[name].append(measure(name, n, v, kind, mask, device))
    found: dict[str, Any] = {}
    loose = 2e-4 if device == "cpu" else 3e-2
    for name, each in runs.items():
        if not each:
            continue
        if "absent" in each[0]:
            found[name] = each[0]
            continue
        for field in ("norms",) if (name, kind) in VALUELESS else ("value", "norms"):
            pair = (torch.tensor(one[0][field]) for one in (each, runs["naive"]))
            torch.testing.assert_close(*pair, rtol=loose, atol=1e-6)
        ratios = {what: [a[what] / max(b[what], 1e-9) for a, b in zip(each, runs["naive"])] for what in ("mib", "seconds")}
        found[name] = {
            "mib": round(middle([run["mib"] for run in each])),
            "seconds": round(middle([run["seconds"] for run in each]), 4),
            "memory": round(middle(ratios["mib"]), 3),
            "time": round(middle(ratios["seconds"]), 3),
            "rounds": len(each),
            **{what: float(f"{each[0][what]:.2e}") for what in ("value_error", "gradient_error") if what in each[0]},
        }
    return found


def rows_of(n: int, v: int, kind: str, mask: int, found: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Lines of a case: limbeck in memory and time, then each peer; floors."""
    from common import absent, matmul_rate, row

    wide, own = WIDTHS[device], found["limbeck"]
    scored = n * (100 - mask) // 100
    operations = 2 * scored * v * ((wide[1] if kind != "top64" else 0) + 3 * wide[0])
    seconds, mib = operations / matmul_rate(device), 4 * (v + n) * wide[0] / 2**20
    title = f"{kind}, N {n}, V {v}, {mask} % prompt"
    text = f"the two gradients: {mib:.0f} MiB; measured {own['mib']} MiB"
    lines = [row(f"{title}: memory over the plain one", own["memory"], TARGETS["memory"], floor=text)]
    text = (
        f"{operations / 1e9:.0f} Gflop: {seconds:.2f} s; measured {own['seconds']:.2f} s, the plain one {found['naive']['seconds']:.2f} s"
    )
    target = TARGETS["time" if mask == 0 else "time_masked"]
    lines.append(row(f"{title}: time over the plain one", own["time"], target, floor=text))
    for name, words in TITLES.items():
        if name not in found or ("absent" in found[name] and mask):
            continue  # not measured under this mask, or said once
        got = found[name]
        if "absent" in got:
            lines.append(absent(f"{title}: {words} (peer)", got["absent"]))
        else:
            note = f"memory {got['memory']} of the plain one; limbeck takes {own['seconds'] / got['seconds']:.2f} of its time"
            lines.append(row(f"{title}: {words} (peer), time over the plain one", got["time"], note=note))
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Print one line of JSON."""
    from common import parser, say

    options = parser(__doc__, cuda=True)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--arm", choices=ARMS)
    options.add_argument("--once")
    given = options.parse_args(words)
    if given.arm:
        serve(given.arm)
        return
    if given.once:
        print(json.dumps(child(*json.loads(given.once))), flush=True)
        return
    cases, rows = {}, []
    for n, v, kind, mask in grid(given.device, given.quick):
        name = f"{kind}_{n}_{v}_{mask}"
        cases[name] = case(n, v, kind, mask, 1 if given.quick else given.repeats if v < 10**5 else 2, given.device, given.quick)
        rows += rows_of(n, v, kind, mask, cases[name], given.device)
        print(name, cases[name], file=sys.stderr, flush=True)
    say("vocabulary", given.quick, rows, targets=TARGETS, cases=cases)


if __name__ == "__main__":
    main()
