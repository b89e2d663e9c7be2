"""Every benchmark's checks of equal maths, on tiny sizes, and what is written about them."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_all():
    return load("run_all")


def test_every_script_passes_its_checks(run_all):
    """Each asserts equal values and gradients of its arms before it times them; a script that fails ends the run."""
    done = subprocess.run([sys.executable, str(FOLDER / "run_all.py"), "--quick"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert list(said["rows"]) == list(run_all.SCRIPTS)
    assert all(count > 0 for count in said["rows"].values())


def test_every_script_is_run():
    """What is not a part of others has a place in the table."""
    scripts = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == {*load("run_all").SCRIPTS, "run_all"}


def test_a_row_says_whether_its_target_is_met():
    common = load("common")
    assert common.row("x", 1.04, 1.05)["met"] is True
    assert common.row("x", 1.06, 1.05)["met"] is False
    assert common.row("x", 0.9, 1.0, higher=True)["met"] is False
    assert common.row("x", 3.0)["met"] is None
    assert common.absent("x", "why")["met"] is None


def test_times_are_compared_within_their_round():
    common = load("common")
    times = {"a": [(2.0, 4.0), (9.0, 9.0), (30.0, 30.0)], "b": [(1.0, 1.0), (3.0, 3.0), (10.0, 5.0)]}
    found = common.over(times, "a", "b")
    assert found["ratio"] == 3.0 and found["ratio_wall"] == 4.0 and found["iqr"] == [2.5, 3.0]
    assert common.milliseconds(times["b"], 2) == {"ms": 1500.0, "ms_wall": 1500.0}


def test_every_arm_comes_first_equally_often():
    common = load("common")
    orders = [common.rotated("abc", number) for number in range(6)]
    assert sorted(order[0] for order in orders) == sorted("aabbcc")
    assert len({tuple(order) for order in orders}) == 6


def test_the_table_tells_misses_and_absences(run_all):
    common = load("common")
    rows = [common.row("own | step", 1.2, 1.05, floor="1.0", iqr=[1.1, 1.3]), common.absent("a peer", "import fails: no torchvision")]
    text = run_all.page({"machine": {"cpu": "some"}, "step_overhead": {"rows": rows, "load": 0.1}})
    assert "| own / step | 1.2 | 1.1 to 1.3 | at most 1.05 | **missed** | 1.0 |  |" in text
    assert "| a peer | not run | | | | | import fails: no torchvision |" in text
    assert "0 of 1 targets are met" in text and "Not measured: `startup`." in text


def test_the_page_is_of_the_results(run_all):
    results = json.loads((FOLDER / "results.json").read_text())
    cuda = FOLDER / "results-cuda.json"
    gpu = json.loads(cuda.read_text()) if cuda.is_file() else None
    assert (ROOT / "docs" / "benchmarks.md").read_text() == run_all.page(results, gpu)


def test_results_name_no_machine_and_no_path():
    import socket

    for path in (*FOLDER.glob("results*.json"), ROOT / "docs" / "benchmarks.md"):
        text = path.read_text()
        assert not re.search(r"(?<![\w.`])/(home|root|tmp|work|usr|var|opt)/", text), path
        assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_peers_are_pinned():
    lines = [line for line in (FOLDER / "peers.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+]+", line) for line in lines)
    names = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert {"torchdistill", "nvidia-modelopt", "trl", "liger-kernel", "torchtune", "sentence-transformers", "ddranking"} <= names
    assert "torchvision" not in names
