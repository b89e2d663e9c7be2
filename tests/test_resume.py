"""kill -9 at random moments, Ctrl-C, torn checkpoints: nothing is lost and no bit differs."""

import random
import signal
import subprocess
import sys
import time

import pytest

WEIGHTS = "student/model.safetensors"


def start(folder, recipe, out, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "limbeck", "run", recipe, "--out", out, "--quiet", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def to_the_end(folder, recipe, out, *words):
    process = start(folder, recipe, out, *words)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe with a checkpoint every few steps, and the bits of its undisturbed run."""
    import yaml

    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("resume")
    recipe = {**TINY, "training": {**TINY["training"], "steps": 400}, "checkpoints": {"every_steps": 25}}
    recipe["data"] = {**TINY["data"], "augment": ["shift:1", "noise:0.05"]}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    began = time.monotonic()
    to_the_end(folder, "r.yaml", "whole")
    seconds = time.monotonic() - began
    return folder, (folder / "whole" / WEIGHTS).read_bytes(), seconds


def killed_and_resumed(place, number, kills=3):
    folder, wanted, seconds = place
    draw = random.Random(number)
    out = f"killed-{number}"
    for _ in range(kills):
        resume = ["--resume"] if (folder / out / "recipe.yaml").exists() else []
        process = start(folder, "r.yaml", out, *resume)
        time.sleep(draw.uniform(0.3 * seconds, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
    resume = ["--resume"] if (folder / out / "recipe.yaml").exists() else []
    to_the_end(folder, "r.yaml", out, *resume)
    assert (folder / out / WEIGHTS).read_bytes() == wanted


@pytest.mark.parametrize("number", range(2))
def test_kill_and_resume_is_bit_identical(place, number):
    killed_and_resumed(place, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100, 110))
def test_kill_many_times(place, number):
    """Whole processes, as a user starts them; `test_faults_kill.py` kills forked ones, of every kind of work, many more times."""
    killed_and_resumed(place, number)


def test_ctrl_c_saves_and_says_how_to_go_on(place):
    folder, _, _ = place
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "run", "r.yaml", "--out", "stopped", "--set", "training.steps=100000"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "stopped/log.jsonl"
    for _ in range(600):
        time.sleep(0.05)
        if log.exists() and '"student"' in log.read_text():
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resume with: limbeck run r.yaml --set training.steps=100000 --out stopped --resume" in errors
    assert list((folder / "stopped/checkpoints/student").glob("step-*"))


def test_torn_checkpoint_falls_back_and_says_so(place):
    """The newest checkpoint is cut short: the one before it is used, the student is the same, and the run names the torn file."""
    import shutil

    folder, wanted, _ = place
    shutil.copytree(folder / "whole", folder / "torn")
    (folder / "torn/summary.json").unlink()
    newest = sorted((folder / "torn/checkpoints/student").glob("step-*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    output = to_the_end(folder, "r.yaml", "torn", "--resume")
    assert (folder / "torn" / WEIGHTS).read_bytes() == wanted
    assert "torn or was altered" in output


def test_one_flipped_bit_is_found(tmp_path):
    """Any altered byte of a checkpoint is noticed."""
    import torch

    from limbeck.engine import checkpoint
    from limbeck.errors import UserError

    path = checkpoint.save(tmp_path, 1, {"w": torch.arange(64.0), "note": [1, 2.5, None, {"a": (1, "x")}]})
    back = checkpoint.read(path)
    assert torch.equal(back["w"], torch.arange(64.0)) and back["note"] == [1, 2.5, None, {"a": (1, "x")}]
    for name in ("state.safetensors", "state.json"):
        good = (path / name).read_bytes()
        for position in range(0, len(good), max(1, len(good) // 40)):
            bad = bytearray(good)
            bad[position] ^= 1
            (path / name).write_bytes(bytes(bad))
            try:
                read = checkpoint.read(path)
            except UserError:
                continue
            # a flipped bit of white space or of the two stored digests' letter case cannot alter the state
            assert torch.equal(read["w"], back["w"]) and read["note"] == back["note"]
        (path / name).write_bytes(good)


def test_two_runs_in_one_folder_are_locked_out(place):
    folder, _, _ = place
    first = start(folder, "r.yaml", "locked", "--set", "training.steps=100000")
    for _ in range(600):
        time.sleep(0.05)
        if (folder / "locked/log.jsonl").exists():
            break
    second = start(folder, "r.yaml", "locked", "--resume", "--set", "training.steps=100000")
    _, errors = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and "another run works in" in errors
