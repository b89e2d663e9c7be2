"""A process that dies at every single file-system operation of a checkpoint, a store, a kept teacher, a run folder, a log."""

from functools import partial
from pathlib import Path

import pytest

from tests import faults_injected
from tests.faults import child

BOTH = [pytest.param(False, marks=pytest.mark.slow), True]
"""Whether the file under way also loses its second half, as after a power cut; without that is the easier case."""


def _state(number):
    import torch

    torch.manual_seed(number)
    return {"step": number, "modules": {"student": {"w": torch.randn(40, 5), "b": torch.randn(5)}}, "random": {"a": [1, 2.5, None]}}


def _checkpoint(folder, step, keep):
    from limbeck.engine import checkpoint

    checkpoint.save(Path(folder), step, _state(step), keep)


def _died(folder, work, *arguments, number, torn):
    """Whether the child died at the operation, that is, whether there was one of that number."""
    work = partial(_after, partial(faults_injected.die_at, str(folder), number, torn), work)
    ended = child(work, *arguments, cwd=folder.parent)
    assert ended.code in (0, -9), ended.errors
    return ended.code == -9


def _after(fault, work, *arguments):
    fault()
    work(*arguments)


def _every_operation(home, begin, work, check, torn):
    """Kill `work` at its operation 0, 1, 2, ... until it lives; `begin` makes the folder, `check` looks at what is left."""
    number = 0
    while True:
        folder = home / f"at-{number}"
        folder.mkdir()
        arguments = begin(folder)
        died = _died(folder, work, *arguments, number=number, torn=torn)
        check(folder, died)
        if not died:
            return number
        number += 1


@pytest.mark.parametrize("torn", BOTH)
@pytest.mark.parametrize(("keep", "step"), [(1, 30), (1, 20), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_a_checkpoint_is_whole_wherever_its_writer_dies(tmp_path, keep, step, torn):
    """Step 20 is there; step 30 or 20 again is written. One of the two is always found, whole, and the next save leaves nothing over."""
    from limbeck.engine import checkpoint

    def begin(folder):
        _checkpoint(folder, 10, keep)
        _checkpoint(folder, 20, keep)
        return str(folder), step, keep

    def check(folder, died):
        state, _, warnings = checkpoint.latest(folder)
        assert state["step"] in ((20, step) if died else (step,)) and not warnings
        assert state["modules"]["student"]["w"].equal(_state(state["step"])["modules"]["student"]["w"])
        checkpoint.save(folder, 40, _state(40), keep)
        left = sorted(p.name for p in folder.iterdir())
        assert len(left) == keep and left[-1] == "step-00000040", left
        assert checkpoint.latest(folder)[0]["step"] == 40

    assert _every_operation(tmp_path, begin, _checkpoint, check, torn) >= 10


def test_a_torn_later_checkpoint_pushes_no_whole_one_out(tmp_path):
    """Step 50 is torn, so the run goes on from 20 and saves 30; with keep=1 exactly that one must stay."""
    from limbeck.engine import checkpoint

    for step in (20, 50):
        checkpoint.save(tmp_path, step, _state(step), keep=2)
    file = tmp_path / "step-00000050/state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    state, _, warnings = checkpoint.latest(tmp_path)
    assert state["step"] == 20 and len(warnings) == 1
    checkpoint.save(tmp_path, 30, _state(30), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000030"]
    assert checkpoint.latest(tmp_path)[0]["step"] == 30


def _store(folder):
    import torch

    from limbeck.signals.store import StoreWriter

    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(25, 3, generator=generator)
    writer = StoreWriter(folder, teacher_fingerprint="t", data_fingerprint="d", samples=25, signals={"logits": (3,)}, shard_size=10)
    for start in range(writer.next_index, 25, 5):
        writer.write(torch.arange(start, start + 5), {"logits": rows[start : start + 5]})
    writer.finish()


@pytest.mark.parametrize("torn", BOTH)
def test_a_store_goes_on_wherever_its_writer_dies(tmp_path, torn):
    """Every shard and every writing of the manifest: the same command makes the same bytes, and nothing else lies there."""
    from limbeck.errors import UserError
    from limbeck.signals.store import Store
    from tests.faults import digests

    whole = tmp_path / "whole"
    _store(whole)
    wanted = digests(whole, "*")

    def check(folder, died):
        if died and digests(folder, "*") != wanted:
            with pytest.raises(UserError):
                Store(folder)  # what is not complete is not read
        _store(folder)
        assert digests(folder, "*") == wanted and Store(folder).total == 25

    assert _every_operation(tmp_path, lambda folder: (str(folder),), _store, check, torn) >= 20


def _kept(cache):
    """Train and keep a small network, as a recipe's teacher is."""
    import os

    import torch

    from limbeck import models
    from limbeck.engine.session import Session

    os.environ["LIMBECK_CACHE"] = cache
    network = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(network.weight)

    def train(work, key):
        work.mkdir(exist_ok=True)
        (work / "step").write_text("a checkpoint")
        torch.manual_seed(3)
        torch.nn.init.normal_(network.weight)
        torch.nn.init.normal_(network.bias)
        return network

    session = Session()
    found = models.kept({"made": "from this"}, network, session, "teacher", train)
    assert not session.notes, session.notes
    return found.weight.tolist()


@pytest.mark.parametrize("torn", BOTH)
def test_a_kept_teacher_is_whole_wherever_its_writer_dies(tmp_path, torn, monkeypatch):
    """The next run finds it, or trains it again: the same weights, and no draft and no checkpoint left over."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "whole"))
    wanted = _kept(str(tmp_path / "whole"))

    def check(folder, died):
        assert _kept(str(folder)) == wanted
        assert _kept(str(folder)) == wanted
        assert not [p for p in (folder / "models").iterdir() if not p.name.endswith(".lock") and ("." in p.name)]

    assert _every_operation(tmp_path, lambda folder: (str(folder),), _kept, check, torn) >= 10


def _run_files(folder):
    """What a run writes when it opens its folder: the lock, the probe, the recipe."""
    from limbeck import recipe, run
    from tests.conftest import TINY

    folder = Path(folder)
    lock = run._open_folder(folder, recipe.resolve(TINY), resume=(folder / "recipe.yaml").is_file())
    lock.release()


def test_a_folder_can_be_used_wherever_its_first_run_dies(tmp_path):
    """Also when not even the recipe was written; nothing is left over, and no lock outlives its holder."""

    def check(folder, died):
        _run_files(folder)
        assert {p.name for p in folder.iterdir()} <= {".lock", "recipe.yaml"}

    assert _every_operation(tmp_path, lambda folder: (str(folder),), _run_files, check, torn=True) >= 5


def _log(path, step):
    from limbeck.engine.callbacks import JsonLines

    log = JsonLines(Path(path))
    log.start("student", step, 10)
    for number in range(step + 1, 6):
        log.log({"phase": "student", "step": number, "loss": 0.5})


def test_a_log_is_mended_wherever_its_writer_dies(tmp_path):
    """Also when a line is half written: after going on every step stands there once, and every line is whole."""
    import json

    def check(folder, died):
        log = folder / "log.jsonl"
        if log.exists():
            log.write_bytes(log.read_bytes() + b'{"phase": "student", "st')
        _log(log, 3)
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5]

    def begin(folder):
        _log(folder / "log.jsonl", 0)
        return str(folder / "log.jsonl"), 3

    assert _every_operation(tmp_path, begin, _log, check, torn=True) >= 5
