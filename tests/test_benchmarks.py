"""Each benchmark's check of equal maths, on tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("step_overhead", "epochs", "cached_teacher", "startup", "condensation", "mining", "sampling", "vocabulary", "language")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize(
    "command",
    [("step_overhead", "--case", "mlp"), *((name,) for name in SCRIPTS if name != "step_overhead")],
    ids=lambda command: command[0],
)
def test_quick(command):
    name, *options = command
    done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), "--quick", *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert json.loads(line)["benchmark"] == name
