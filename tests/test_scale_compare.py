"""Comparisons in several processes of this machine: the same figures, one teacher, and nothing is lost when a run or a process is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from limbeck.cli import main
from tests.conftest import TINY

psutil = pytest.importorskip("psutil")

METHODS = '''
import os
import time
from dataclasses import dataclass
from pathlib import Path

from limbeck.errors import UserError
from limbeck.knowledge.methods.kd import KD
from limbeck.method import Card


def card(name):
    return Card(id=name, title=name, year=2026, wing="knowledge", family="response", claim="c", equation="kl")


@dataclass
class Refused(KD):
    """Refuses its settings when training begins."""

    card = card("refused")

    def setup(self, *given):
        raise UserError("this method does not fit", "take another")


@dataclass
class Broken(KD):
    """A mistake."""

    card = card("broken")

    def loss(self, *given):
        raise ZeroDivisionError("one by nought")


@dataclass
class Killed(KD):
    """Its process dies in step 7: `times` times."""

    card = card("killed")
    times: int = 1

    def loss(self, batch, student, teacher, clock):
        mark = Path(f"killed-{os.getpid()}")
        if clock.step == 7 and len(list(Path.cwd().glob("killed-*"))) < self.times:
            mark.touch()
            os.kill(os.getpid(), 9)
        return super().loss(batch, student, teacher, clock)


@dataclass
class Slow(KD):
    """A step takes as many seconds as the environment says."""

    card = card("slow")

    def loss(self, batch, student, teacher, clock):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return super().loss(batch, student, teacher, clock)
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with a recipe, some methods, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    sys.modules.pop("mine", None)
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "checkpoints": {"every_steps": 5}}))
    Path("mine.py").write_text(METHODS)
    return tmp_path


def compared(capsys, out, methods, *words, code=0, seeds=2):
    """The table without times, the weights of every student, and what was said."""
    assert main(["compare", "tiny.yaml", "--methods", methods, "--seeds", str(seeds), "--json", "--out", out, *words]) == code
    said = capsys.readouterr()
    return without_time(json.loads(said.out)) if said.out else None, students(out), said.err


def students(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).glob("runs/*/student/*.safetensors"))}


def without_time(value):
    """JSON without the keys that tell time."""
    if isinstance(value, dict):
        return {key: without_time(item) for key, item in value.items() if key != "seconds"}
    return [without_time(item) for item in value] if isinstance(value, list) else value


def summaries(out):
    return [json.loads(path.read_text()) for path in sorted(Path(out).glob("runs/*/summary.json"))]


def test_two_processes_give_what_one_gives_and_train_one_teacher(home, capsys, monkeypatch):
    """One of the processes is killed on the way: its run goes on from the checkpoint, in another one."""
    methods = "alone,python:mine:Killed"
    together = compared(capsys, "two", methods, "--workers", "2")
    assert "2 processes, 1 threads each" in together[2] and "[4/4]" in together[2]
    assert len(list(home.glob("killed-*"))) == 1
    # the killed process may be the one that trained it: its run then goes on with what it finds
    assert sum("teacher" in summary["phases"] for summary in summaries("two")) <= 1, "both need the teacher at once; one trains it"
    logs = [path.read_text() for path in Path("two").glob("runs/*/log.jsonl")]
    assert sum('"phase": "teacher", "step": 1,' in log for log in logs) == 1
    assert len(list(Path("cache/models").glob("*/model.safetensors"))) == 1 and not list(Path("cache/models").glob("*.training"))
    monkeypatch.setenv("LIMBECK_CACHE", str(home / "other"))
    alone = compared(capsys, "one", methods)
    assert alone[:2] == together[:2] and len(alone[1]) == 4
    again = compared(capsys, "two", methods, "--workers", "2")
    assert again[0] == together[0] and "processes" not in again[2], "nothing was left to do"
    for name in ("comparison.csv", "comparison.md", "report.html"):
        assert (Path("two") / name).is_file()


def test_a_run_that_fails_takes_no_other_with_it(home, capsys):
    table, kept, err = compared(capsys, "c", "kd,python:mine:Refused,alone", code=2, seeds=1)
    assert [row["status"] for row in table["rows"]] == ["done", "failed: this method does not fit", "done"] and len(kept) == 2
    assert "error: 1 of 3 runs failed; python:mine:Refused seed 0: this method does not fit" in err and "hint: take another" in err
    table, _, err = compared(capsys, "c", "kd,python:mine:Refused,python:mine:Broken", code=1, seeds=1)
    _check_fault(table, err)
    assert compared(capsys, "d", "python:mine:Refused", code=2)[0] is None, "nothing to show"


def _check_fault(table, err):
    assert [row["status"][:6] for row in table["rows"][:3]] == ["done", "failed", "failed"]
    assert "runs failed; python:mine:Broken seed 0: ZeroDivisionError: one by nought" in err
    [trace] = Path("c/runs").glob("*.traceback.txt")
    assert trace.name in err and "line" in trace.read_text() and "one by nought" in trace.read_text()


def test_a_process_that_fails_or_dies_again_and_again_takes_no_other_with_it(home, capsys, monkeypatch):
    monkeypatch.setattr("limbeck.scaling.pool.RETRIES", 1)
    methods = "kd,python:mine:Refused,python:mine:Broken,python:mine:Killed@times=99,alone"
    table, kept, err = compared(capsys, "c", methods, "--workers", "1", code=1, seeds=1)
    _check_fault(table, err)
    assert [row["status"] for row in table["rows"][3:]] == ["failed: its process was killed 2 times, last by SIGKILL", "done"]
    assert len(kept) == 2 and "python:mine:Killed@times=99 seed 0: failed: its process was killed" in err
    monkeypatch.setattr("limbeck.scaling.pool.RETRIES", 0)
    table, _, err = compared(capsys, "c", "kd,python:mine:Killed@times=99", "--workers", "1", code=2, seeds=1)
    assert "hint: give each run more memory" in err and "finished runs are kept" in err


def children(process):
    return [child for child in psutil.Process(process.pid).children() if "limbeck.scaling.child" in child.cmdline()]


def begun():
    """Start a comparison of slow runs in two processes; returns when both have saved a checkpoint."""
    words = ["compare", "tiny.yaml", "--methods", "python:mine:Slow", "--seeds", "2", "--workers", "2", "--out", "c"]
    env = {**os.environ, "SLOW": "0.5"}  # the first run must not end before the second process has come up
    line = [sys.executable, "-m", "limbeck", *words]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    end = time.monotonic() + 300
    while len({path.parts[2] for path in Path("c").glob("runs/*/checkpoints/student/step-*")}) < 2:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process, children(process)


@pytest.mark.slow
def test_ctrl_c_saves_every_run_and_says_how_to_go_on(home, capsys):
    process, workers = begun()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with: limbeck compare tiny.yaml --methods python:mine:Slow --seeds 2 --out c --workers 2" in err
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)
    assert not list(Path("c").glob("runs/*/summary.json"))
    resumed = compared(capsys, "c", "python:mine:Slow")
    assert compared(capsys, "d", "python:mine:Slow")[:2] == resumed[:2]


@pytest.mark.slow
def test_no_process_outlives_a_killed_command(home):
    process, workers = begun()
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2 and not alive


def test_objects_stay_in_this_process(tiny, tmp_path):
    import limbeck
    from limbeck.scaling.sizing import Sizing

    with pytest.raises(limbeck.UserError, match="do not travel"):
        limbeck.compare(tiny, ["kd"], 1, out=tmp_path / "c", given={"student": object()}, sizing=Sizing(workers=2))
    assert not os.path.exists(tmp_path / "c")
