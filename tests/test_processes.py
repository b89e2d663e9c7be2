"""Several processes on one run: the same student as one process gives, whole or sharded, also after a change of their number."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limbeck import processes
from limbeck.data import Batches
from limbeck.data.split import TensorSplit
from limbeck.engine import checkpoint
from limbeck.recipe import resolve
from limbeck.run import execute
from tests.conftest import TINY, TINY_TEXT
from tests.joint_runs import stopped

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NEAR = 1e-5
"""The issue's bound: greatest difference between a weight of the student of two processes and of one."""

SHORT = {"steps": 8, "batch": 32, "lr": 0.01}
CASES = {
    # a third of the labels hidden, unequal numbers of them on the two processes; parts, clipping, a weight average
    "parts": {**TINY, "training": {**SHORT, "accumulate": 2, "clip": 0.5, "ema": 0.9}},
    # tokens are scored unequally too
    "text": {**TINY_TEXT, "training": {**SHORT, "batch": 8}},
    # what the student said of a sample in an earlier epoch may have been said on the other process
    "history": {**TINY, "method": {"id": "ps-kd"}, "teacher": {}, "training": {**SHORT, "steps": 24, "batch": 100}},
}


GENERATOR = {
    **{key: TINY[key] for key in ("threads", "device", "trackers")},
    "name": "generator",
    "method": {"id": "decoupled-dmd"},  # two turns: the generator, and the network of its score
    "teacher": {"model": "denoising-mlp", "args": {"width": 24, "depth": 2}, "train": {"steps": 20, "batch": 32}},
    "student": {"model": "teacher"},
    "data": {"source": "digits", "train": 300},
    "training": {"steps": 6, "batch": 8},
    "generate": {"steps": [2], "guidance": 2.0, "samples": 64, "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 20}}},
}


def recipe(name, **changes):
    made = copy.deepcopy(CASES[name]) | {"checkpoints": {"every_steps": 4, "keep": 9}, "baseline": name == "parts", **changes}
    if made["teacher"]:
        made["teacher"]["train"]["steps"] = 10
    return made


def run_alone(made, out, resume=False):
    """The same on one process."""
    execute(resolve(made), out, resume=resume, report=False)


def launch(folder, jobs):
    """Run jobs on two processes; returns what was printed."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("joint_runs.py")
    done = subprocess.run(
        [*LAUNCH, str(script), str(file)], capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def distance(a, b):
    """Greatest difference of a weight of two runs' students."""
    first, second = (load_file(next((Path(folder) / "student").glob("*.safetensors"))) for folder in (a, b))
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The cases on one process, on two, and sharded over two; and runs that changed the number of their processes in the middle."""
    folder = tmp_path_factory.mktemp("processes")
    plain = recipe("parts", training={key: value for key, value in CASES["parts"]["training"].items() if key != "ema"}, baseline=False)
    for name in CASES:
        run_alone(recipe(name), folder / "one" / name)
    run_alone(plain, folder / "one" / "plain")
    ddp, fsdp = {"parallel": "ddp"}, {"parallel": "fsdp"}
    jobs = [{"recipe": recipe(name) | ddp, "out": f"{folder}/two/{name}"} for name in CASES]
    jobs += [{"recipe": recipe("text") | ddp, "out": f"{folder}/one-then-two", "of": f"{folder}/one/text", "resume": True}]
    jobs += [{"recipe": made | fsdp, "out": f"{folder}/sharded/{name}"} for name, made in (("text", recipe("text")), ("plain", plain))]
    jobs += [{"recipe": recipe("text") | fsdp, "out": f"{folder}/two-then-sharded", "of": f"{folder}/two/text", "resume": True}]
    jobs += [{"recipe": GENERATOR, "out": f"{folder}/generator"}, {"recipe": GENERATOR | fsdp, "out": f"{folder}/sharded-generator"}]
    jobs += [{"recipe": recipe("parts", training={**SHORT, "batch": 31}), "out": f"{folder}/mistaken"}]
    jobs += [{"recipe": recipe("parts") | fsdp, "out": f"{folder}/refused"}]
    said = launch(folder, jobs)
    stopped(folder / "sharded" / "text", folder / "sharded-then-one")
    run_alone(recipe("text"), folder / "sharded-then-one", resume=True)
    (folder / "said.txt").write_text(said)
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_give_the_student_of_one(runs, name):
    assert distance(runs / "one" / name, runs / "two" / name) < NEAR


@pytest.mark.parametrize("name", ["text", "plain"])
def test_two_processes_with_shards_give_the_student_of_one(runs, name):
    assert distance(runs / "one" / name, runs / "sharded" / name) < NEAR


def test_a_generator_is_trained_by_two_processes_that_stay_alike(runs):
    summary = json.loads((runs / "generator" / "summary.json").read_text())
    assert summary["processes"] == 2 and (runs / "generator" / "generator" / "generator.json").is_file()
    said = (runs / "said.txt").read_text()
    marks = dict(re.findall(r"generator of process (\d): ([0-9a-f]{16})", said))  # two processes write to one pipe: lines may run together
    assert set(marks) == {"0", "1"} and marks["0"] == marks["1"], said


@pytest.mark.parametrize("name", ["one-then-two", "two-then-sharded", "sharded-then-one"])
def test_a_checkpoint_serves_another_number_of_processes(runs, name):
    assert distance(runs / "one" / "text", runs / name) < NEAR


@pytest.mark.parametrize("name", list(CASES))
def test_metrics_of_two_processes_are_those_of_the_whole_split(runs, name):
    one, two = (json.loads((runs / kind / name / "summary.json").read_text()) for kind in ("one", "two"))
    assert two["processes"] == 2 and "processes" not in one
    for role, figures in one["metrics"].items():
        assert two["metrics"][role] == pytest.approx(figures, rel=1e-4, abs=1e-5), role


def test_only_process_0_writes_the_log_and_its_losses_are_means(runs):
    logs = ([json.loads(line) for line in (runs / kind / "text" / "log.jsonl").read_text().splitlines()] for kind in ("one", "two"))
    one, two = ([record for record in log if record["phase"] == "student"] for log in logs)
    steps = [[(r["phase"], r["step"], r["loss"]) for r in log if "loss" in r] for log in (one, two)]
    assert [row[:2] for row in steps[0]] == [row[:2] for row in steps[1]]
    assert [row[2] for row in steps[1]] == pytest.approx([row[2] for row in steps[0]], rel=1e-4)
    norms = [[t["norm"] for r in log for t in r.get("terms", {}).values() if "norm" in t] for log in (one, two)]
    assert norms[0] and norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_launcher_starts_the_command_line_and_a_stop_is_agreed_upon(tmp_path, tiny):
    tiny |= {"training": {"steps": 100_000, "batch": 32}, "baseline": False, "checkpoints": {"every_seconds": 1000}}
    tiny["teacher"]["train"]["steps"] = 10
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny))
    command = [*LAUNCH, "-m", "limbeck", "run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, until = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and '"phase": "student"' in log.read_text()):
        assert started.poll() is None and time.monotonic() < until, started.stderr.read()[-3000:]
        time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=120)[1]
    assert said.count("resume with: limbeck run") == 1, said[-3000:]
    state, path, _ = checkpoint.latest(tmp_path / "run" / "checkpoints" / "student")
    assert path is not None and len(state["processes"]) == 2 and 0 < state["step"] < 100_000
    # noise of its own on each process, and a checkpoint that knows both
    assert not torch.equal(*(own["random"]["torch"] for own in state["processes"]))


def test_a_mistake_is_told_by_every_process_and_leaves_nothing(runs):
    said = (runs / "said.txt").read_text()
    for rank in (0, 1):
        assert f"process {rank}: a batch of 31 cannot be cut into 1 equal parts for each of 2 processes" in said
        assert f"process {rank}: models cannot be sharded here: training.ema keeps a second whole student" in said
        assert f"process {rank}: generators are trained whole on every process" in said
    assert not (runs / "mistaken" / "recipe.yaml").exists()


# ---- pieces, without a launcher ----


def test_alone_nothing_is_exchanged():
    value = torch.tensor([1.0, 2.0])
    assert processes.world() == 1 and processes.rank() == 0 and processes.asked() == 1
    assert processes.summed(value) is value and processes.joined(value) is value and processes.told("x") == "x"
    assert list(processes.shared("abc")) == [("a", True), ("b", True), ("c", True)]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_shared_work_goes_round_and_comes_back_in_order(count, monkeypatch):
    found = []
    for rank in range(3):
        monkeypatch.setattr(processes, "world", lambda: 3)
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        found.append(list(processes.shared(range(count))))
    assert len({len(part) for part in found}) == 1  # everybody works in step
    assert processes.in_order([[item for item, counts in part if counts] for part in found]) == list(range(count))


def test_shares_of_a_batch_are_the_batch():
    split = TensorSplit(torch.arange(40.0).unsqueeze(1), torch.arange(40))
    whole = Batches(split, 12, seed=3).batch_at(1, 2)
    parts = [Batches(split, 12, seed=3, share=(rank, 3)).batch_at(1, 2) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.stack([part.index for part in parts], 1).flatten(), whole.index)


def test_a_checkpoint_of_other_processes_gives_each_what_it_can_use():
    state = {"memory": "m0", "random": "r0", "processes": [{"memory": "m0", "random": "r0"}, {"memory": "m1", "random": "r1"}]}
    assert checkpoint.of_process(state, 1, 2) == {"memory": "m1", "random": "r1"}
    assert checkpoint.of_process(state, 0, 1) == {"memory": "m0", "random": "r0"}
    assert checkpoint.of_process(state, 2, 3) == {"memory": "m0", "random": None}
    alone = {"memory": "m", "random": "r"}
    assert checkpoint.of_process(alone, 0, 1) == alone
    assert checkpoint.of_process(alone, 1, 2) == {"memory": "m", "random": None}


def test_fsdp_1_is_refused(monkeypatch):
    from limbeck.errors import UserError

    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in {**launcher, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="version 1"):
        processes.begin("cpu")


def test_commands_that_cannot_share_their_work_say_so(limbeck, tmp_path):
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for command in (["compare", "digits", "--methods", "kd"], ["cache", "digits", "--out", tmp_path / "store"]):
        done = limbeck(*command, **launcher)
        assert done.returncode == 2 and "process 1: `limbeck" in done.stderr and "without one" in done.stderr


def test_a_save_that_all_wished_for_is_made_once(monkeypatch):
    from limbeck.engine.agreement import Agreement

    class Done:
        def wait(self):
            """Nobody else is there."""

    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "wish", lambda values: Done())
    agreed = Agreement()
    assert [agreed(False, late) for late in (True, True, False, False)] == [(False, False), (False, True), (False, False), (False, False)]
    assert [agreed(stop, False)[0] for stop in (True, True)] == [False, True]
    assert agreed.close() and not agreed.close()  # a stop that was wished for in the last step of a phase is not lost


def test_closing_trackers_leaves_the_processes_together(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from limbeck.engine.callbacks import Trackers

    trackers, left = Trackers(["tensorboard"], tmp_path, {}), []
    trackers.log({"phase": "student", "step": 1, "loss": 2.0})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *group: left.append(group))
    trackers.close()
    assert not left and any((tmp_path / "trackers").rglob("events*"))


def test_a_full_disk_of_process_0_is_told_as_such():
    told = processes._portable(OSError(28, "No space left on device", "runs/x"))
    assert isinstance(told, processes.Told) and "disk is full at runs/x" in told.message
    assert not isinstance(processes._portable(KeyError("x")), processes.Told)


def test_a_loader_is_not_shared_out():
    from torch.utils.data import DataLoader, TensorDataset

    from limbeck.data import LoaderSplit
    from limbeck.errors import UserError

    loader = LoaderSplit(DataLoader(TensorDataset(torch.zeros(10, 2), torch.zeros(10).long()), batch_size=4))
    assert len(Batches(loader, 4)) == 3
    with pytest.raises(UserError, match="which 2 processes cannot share out"):
        Batches(loader, 4, share=(0, 2))


def test_what_cannot_be_sharded_is_refused():
    from limbeck.errors import UserError
    from limbeck.knowledge.methods.kd import KD
    from limbeck.knowledge.program import check_shardable
    from limbeck.knowledge.teachers import FrozenTeacher, OnlineTeacher
    from limbeck.schema import Training

    network = torch.nn.Linear(2, 2)
    check_shardable(KD(), FrozenTeacher(network), Training())
    with pytest.raises(UserError, match=r"training\.ema"):
        check_shardable(KD(), FrozenTeacher(network), Training(ema=0.9))
    with pytest.raises(UserError, match="changes while it teaches"):
        check_shardable(KD(), OnlineTeacher(network), Training())
