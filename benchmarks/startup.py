"""Start-up and size: command line, import, dependencies, wheel, first step.

    python benchmarks/startup.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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


def wall(command: list[str], times: int) -> float:
    """Median seconds of a command."""
    spans = []
    for _ in range(times):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        spans.append(time.perf_counter() - begin)
    return round(sorted(spans)[times // 2], 3)


def said(code: str) -> str:
    """What a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    times = 1 if quick else 5
    helped = "import sys, contextlib\nfrom limbeck.cli import main\nwith contextlib.suppress(SystemExit):\n    main(['--help'])\n"
    result: dict[str, Any] = {
        "help_seconds": wall([sys.executable, "-m", "limbeck", "--help"], times),
        "help_imports_torch": said(helped + "print('torch' in sys.modules)") == "True",
        "import_imports_torch": said("import sys, limbeck; print('torch' in sys.modules)") == "True",
        "direct_dependencies": len([one for one in requires("limbeck") or [] if "extra ==" not in one]),
        "targets": {"help_seconds": 0.3, "direct_dependencies": 5},
    }
    if not quick:
        beyond = "import torch, time; b = time.perf_counter(); import limbeck; print(time.perf_counter() - b)"
        result["import_seconds_beyond_torch"] = round(sorted(float(said(beyond)) for _ in range(3))[1], 4)
        result["first_step_seconds_with_imports"] = round(float(said(FIRST_STEP)), 2)
        with tempfile.TemporaryDirectory() as folder:
            made = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT)]
            if subprocess.run(made, capture_output=True).returncode:
                made.remove("--no-build-isolation")
                subprocess.run(made, check=True, capture_output=True)
            result["wheel_bytes"] = next(Path(folder).glob("*.whl")).stat().st_size
    print(json.dumps({"benchmark": "startup", "quick": quick, **result}))


if __name__ == "__main__":
    main()
