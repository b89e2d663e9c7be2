"""Runs every benchmark and writes `benchmarks/results.json` and `docs/benchmarks.md`.

    python benchmarks/run_all.py [--quick] [--only SCRIPT ...] [--device cuda]

`make bench` runs it in the environment `.venv-peers`, where the other libraries are. `--quick` runs the checks on tiny sizes in this
process, prints figures that mean nothing, and writes nothing. `--only` runs some scripts and keeps the figures of the others. Results of a
GPU go to `results-cuda.json` and are not in the page unless that file is there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "step_overhead": "1. What a training step costs beyond a hand-written loop",
    "throughput": "2. Whole training on the pairs of the literature, against torchdistill",
    "epochs": "2. Whole epochs, against loops in the style of other libraries",
    "vocabulary": "3. A divergence over a large vocabulary",
    "cached_teacher": "4. A teacher that is asked once",
    "language": "4. and 7. Language: stored distributions, speculative decoding",
    "condensation": "5. A step of data-set condensation",
    "condensation_score": "5. The fair score of a condensed set, against DD-Ranking",
    "siamese": "5. Augmentation of two batches by one draw, against kornia",
    "mining": "5. Mining of computation trees",
    "sampling": "6. Few-step sampling",
    "on_policy": "7. The on-policy step of a language model, against TRL",
    "sentence": "Further peers: sentence-transformers",
    "pruning": "Further peers: torch-pruning",
    "startup": "8. Start-up and size, against all peers",
}
CUDA = ("step_overhead", "throughput", "vocabulary")
HEAD = """# Benchmarks

Written by `make bench`, that is `python benchmarks/run_all.py` in an environment with the peers of `benchmarks/peers.txt`; every number
behind the table is in `benchmarks/results.json`. Times are process CPU time on one thread (start-up: wall time), medians over rounds in
which the arms take turns, with the interquartile range. Before anything is timed each script asserts that its arms compute the same value
and gradient. A miss is stated as a miss, a lost comparison as a lost one; a peer that cannot run is a row that says why.

Floor: what physics allows, measured in the same run where it can be: operations counted by `torch.utils.flop_counter` at the rate that a
float32 matrix product reaches here, bytes at the speed of a copy in memory or of a synced file. torchvision is never installed: for
torchdistill and DD-Ranking, which import it, empty modules stand in for it (`benchmarks/peers.py`).
"""


def run(name: str, *options: str) -> dict[str, Any]:
    """What a script printed, from a process of its own."""
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed (exit code {done.returncode})")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_here(name: str, *options: str) -> dict[str, Any]:
    """The same in this process, which has the libraries loaded already; for the tests."""
    said, before = io.StringIO(), sys.argv
    sys.argv = [f"{name}.py", *options]
    try:
        with contextlib.redirect_stdout(said):
            importlib.import_module(name).main()
    finally:
        sys.argv = before
    return json.loads(said.getvalue().strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """Facts about the machine; nothing that names it."""
    import torch

    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=HERE.parent, capture_output=True, text=True).stdout.strip()
    sizes = {"memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)} if hasattr(os, "sysconf") else {}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        **sizes,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "load": [round(value, 2) for value in os.getloadavg()],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit + (" and changes" if changed else ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: every GPU part is written and not measured here",
    }


def cell(text: Any) -> str:
    """A cell of a table."""
    return str(text).replace("|", "/").replace("\n", " ")


def lines_of(name: str, found: dict[str, Any]) -> list[str]:
    """The table of one script."""
    lines = [f"## {SCRIPTS[name]}", "", f"`python benchmarks/{name}.py`, load {found.get('load', '?')} at its end", ""]
    lines += ["| measured | figure | IQR | target | | floor, and how far it is | remark |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for one in found["rows"]:
        if one["figure"] is None:
            lines.append(f"| {cell(one['what'])} | not run | | | | | {cell(one['note'])} |")
            continue
        spread = f"{one['iqr'][0]} to {one['iqr'][1]}" if one["iqr"] else ""
        target = "" if one["target"] is None else f"{'at least' if one['higher'] else 'at most'} {one['target']}"
        verdict = {None: "", True: "met", False: "**missed**"}[one["met"]]
        cells = (one["what"], one["figure"], spread, target, verdict, one["floor"], one["note"])
        lines.append("| " + " | ".join(cell(value) for value in cells) + " |")
    return [*lines, ""]


def page(results: dict[str, Any], gpu: dict[str, Any] | None = None) -> str:
    """The document."""
    lines = [HEAD, "## The machine", ""]
    lines += [f"- {name}: {value}" for name, value in results.get("machine", {}).items()] + [""]
    tables = {name: results[name] for name in SCRIPTS if name in results}
    counted = [one["met"] for found in tables.values() for one in found["rows"] if one["met"] is not None]
    lines += [f"{sum(counted)} of {len(counted)} targets are met; the rest are marked.", ""]
    for name, found in tables.items():
        lines += lines_of(name, found)
    missing = [name for name in SCRIPTS if name not in results]
    lines += [f"Not measured: `{name}`." for name in missing] + ([""] if missing else [])
    if gpu:
        lines += ["## On a GPU", "", *(f"- {name}: {value}" for name, value in gpu["machine"].items()), ""]
        for name in SCRIPTS:
            if name in gpu:
                lines += lines_of(name, gpu[name])
    return "\n".join(lines).rstrip() + "\n"


def write(new: dict[str, Any], device: str, fresh: bool) -> None:
    """The results and the page; what is not new stays, unless `fresh`."""
    own, other = (HERE / name for name in ("results.json", "results-cuda.json"))
    file = own if device == "cpu" else other
    kept = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    file.write_text(json.dumps(kept | new, indent=1) + "\n")
    gpu = json.loads(other.read_text()) if other.is_file() else None
    if own.is_file():
        (HERE.parent / "docs" / "benchmarks.md").write_text(page(json.loads(own.read_text()), gpu))


def main() -> None:
    """Run, write after each script, print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=SCRIPTS, nargs="+")
    given = parser.parse_args()
    names = given.only or [name for name in SCRIPTS if given.device == "cpu" or name in CUDA]
    results: dict[str, Any] = {"machine": machine()}
    taken = {}
    for name in names:
        begin = time.perf_counter()
        options = (["--quick"] if given.quick else []) + (["--device", "cuda"] if given.device == "cuda" else [])
        results[name] = (run_here if given.quick else run)(name, *options)
        taken[name] = results[name]["seconds_in_all"] = round(time.perf_counter() - begin, 1)
        if not given.quick:
            write({"machine": results["machine"], name: results[name]}, given.device, fresh=not given.only and name == names[0])
        print(f"{name}: {taken[name]} s", file=sys.stderr, flush=True)
    missed = [one["what"] for name in names for one in results[name]["rows"] if one["met"] is False]
    rows = {name: len(results[name]["rows"]) for name in names}
    print(json.dumps({"benchmark": "run_all", "quick": given.quick, "seconds": taken, "rows": rows, "missed": missed}))


if __name__ == "__main__":
    main()
