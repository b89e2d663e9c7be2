"""Start-up and size, of limbeck and of every peer that pip installs: command line, cold import, dependencies, bytes, first step.

    python benchmarks/startup.py [--quick]

Import: a fresh process, wall time less that of a Python that imports nothing, median of the rounds, in which all packages take turns; the
first import after installation is not among them. Whether an import loads torch is said beside it: limbeck's and transformers-like lazy
ones then cost it later. Dependencies: what a distribution requires without extras; all: with what those require. Bytes: of the installed
files. Floor of an import: that of torch alone, for those that load it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any

from common import absent, middle, parser, rotated, row, say
from peers import version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {  # distribution: what is imported; torchdistill and ddranking with stand-ins for torchvision
    "limbeck": "limbeck",
    "torchdistill": "torchdistill",
    "nvidia-modelopt": "modelopt.torch.distill",
    "trl": "trl.experimental.gkd",
    "liger-kernel": "liger_kernel.chunked_loss",
    "torchtune": "torchtune.modules.loss",
    "sentence-transformers": "sentence_transformers",
    "torch-pruning": "torch_pruning",
    "ddranking": "ddranking.metrics",
}
STAND_IN = ("torchdistill", "ddranking")
TARGETS = {"help": 0.3, "import": 0.3, "dependencies": 5}
FIRST_STEP = """
import time; begin = time.perf_counter()
import torch, limbeck
from torch import nn
torch.set_num_threads(1)
data = limbeck.open_data("digits", train=200)
net = lambda width: nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
from limbeck.engine.session import Session
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.recipe import Training
from limbeck.tasks import Classification
program = KnowledgeProgram(KD(), net(8), FrozenTeacher(net(64)), data, Classification(data.classes), Training(steps=1, batch=32))
Session().fit(program, "student", seed=0)
print(time.perf_counter() - begin)
"""


def wall(command: list[str]) -> float:
    """Seconds of a command."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def said(code: str) -> str:
    """What a fresh Python prints last."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]


def code_of(name: str) -> str:
    """A program that imports a package."""
    if name not in STAND_IN:
        return f"import {PACKAGES[name]}"
    here = str(Path(__file__).resolve().parent)
    return f"import sys; sys.path.insert(0, {here!r}); import peers; peers.need({PACKAGES[name]!r}, stand_in=True)"


def direct(name: str) -> list[str]:
    """Distributions that one requires without extras, for this Python."""
    listed = [one for one in requires(name) or [] if "extra ==" not in one]
    return sorted({re.split(r"[\s;\[<>=!~(]", one)[0].lower().replace("_", "-") for one in listed})


def all_of(name: str) -> set[str]:
    """Those, and what they require, as far as installed."""
    found: set[str] = set()
    todo = [name]
    while todo:
        try:
            new = [one for one in direct(todo.pop()) if one not in found]
        except PackageNotFoundError:
            continue
        found |= set(new)
        todo += new
    return found


def size(name: str) -> int:
    """Bytes of the installed files; of limbeck, which is installed in place here, of its sources."""
    if name == "limbeck":
        return sum(path.stat().st_size for path in (ROOT / "src" / "limbeck").rglob("*") if path.is_file() and path.suffix != ".pyc")
    return sum(file.size or 0 for file in distribution(name).files or [] if not str(file).endswith(".pyc"))


def imports(names: list[str], rounds: int) -> tuple[dict[str, float], dict[str, bool]]:
    """Seconds of a cold import, and whether it loads torch."""
    loads = {name: said(f"{code_of(name)}\nimport sys; print('torch' in sys.modules)") == "True" for name in names}
    codes = {"nothing": "pass", "torch": "import torch", **{name: code_of(name) for name in names}}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for number in range(rounds):
        for name in rotated(codes, number):
            times[name].append(wall([sys.executable, "-c", codes[name]]))
    bare = middle(times.pop("nothing"))
    return {name: round(max(middle(values) - bare, 0.0), 3) for name, values in times.items()}, loads


def wheel() -> int:
    """Bytes of limbeck's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        made = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT)]
        if subprocess.run(made, capture_output=True).returncode:
            made.remove("--no-build-isolation")
            subprocess.run(made, check=True, capture_output=True)
        return next(Path(folder).glob("*.whl")).stat().st_size


def main() -> None:
    """Print one line of JSON."""
    given = parser(__doc__).parse_args()
    rounds = 1 if given.quick else 3
    helped = "import sys, contextlib\nfrom limbeck.cli import main\nwith contextlib.suppress(SystemExit):\n    main(['--help'])\n"
    found: dict[str, Any] = {"help_imports_torch": said(helped + "print('torch' in sys.modules)") == "True"}
    seconds = sorted(wall([sys.executable, "-m", "limbeck", "--help"]) for _ in range(rounds))
    found["help_seconds"] = round(middle(seconds), 3)
    rows = [
        row("seconds of `limbeck --help`", found["help_seconds"], TARGETS["help"], iqr=[round(s, 3) for s in (seconds[0], seconds[-1])])
    ]
    names, missing = [], {}
    for name in ["limbeck"] if given.quick else PACKAGES:
        try:
            distribution(name)
            said(code_of(name) + "\nprint()\nprint(1)")
            names.append(name)
        except PackageNotFoundError:
            missing[name] = "not installed here; `make bench` installs it"
        except subprocess.CalledProcessError as error:
            missing[name] = f"import fails: {error.stderr.strip().splitlines()[-1]}"
    cold, loads = imports(names, rounds)
    for name in PACKAGES:
        peer = "" if name == "limbeck" else " (peer)"
        title = f"{version(name)}{peer}: seconds of a cold import"
        if name in missing:
            rows.append(absent(title, missing[name]))
        elif name in names:
            few, many, held = direct(name), all_of(name), size(name)
            found[name] = {
                "import_seconds": cold[name],
                "loads_torch": loads[name],
                "dependencies": len(few),
                "all_dependencies": len(many),
            }
            found[name]["bytes"] = held
            note = f"{len(few)} dependencies, {len(many)} in all, {held / 1e6:.1f} MB"
            text = f"torch alone: {cold['torch']} s" if loads[name] else "does not load torch"
            rows.append(row(title, cold[name], None if peer else TARGETS["import"], floor=text, note=note))
    rows.append(row("direct dependencies", found["limbeck"]["dependencies"], TARGETS["dependencies"]))
    if not given.quick:
        found["first_step_seconds_with_imports"] = round(float(said(FIRST_STEP)), 2)
        rows.append(row("seconds to the end of the first step, imports and data included", found["first_step_seconds_with_imports"]))
        found["wheel_bytes"] = wheel()
        rows.append(row("megabytes of the wheel", round(found["wheel_bytes"] / 1e6, 3)))
    say("startup", given.quick, rows, targets=TARGETS, torch_import_seconds=cold["torch"], **found)


if __name__ == "__main__":
    main()
