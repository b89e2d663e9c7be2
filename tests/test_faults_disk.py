"""A disk without room, a folder that nobody may write, a clock that jumps, two runs in one folder: a clear line, and nothing is lost."""

import errno
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests import faults_injected
from tests.faults import Kind, child, command, digests, log_of
from tests.faults_kinds import KINDS

CLEAR = {errno.ENOSPC: "error: the disk is full", errno.EROFS: "error: "}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of the kinds used here: the undisturbed result, its seconds, and how many file-system operations it made, and its folder."""
    home, found = tmp_path_factory.mktemp("whole"), {}

    def of(name):
        if name not in found:
            folder, note = home / name, home / f"{name}.operations"
            folder.mkdir()
            KINDS[name].prepare(folder)
            ended = command(
                *KINDS[name].words(folder), cwd=folder, fault=partial(faults_injected.count_operations, str(folder), str(note))
            )
            assert ended.code == 0, ended.errors
            found[name] = KINDS[name].result(folder), ended.seconds, len(note.read_text().splitlines()), folder
        return found[name]

    return of


def _refused(ended, code):
    """Exit code 2, one line that says what, one that says what to do, no traceback."""
    lines = [line for line in ended.errors.splitlines() if line.startswith(("error:", "hint:"))]
    assert ended.code == 2, ended.errors
    assert len(lines) == 2 and lines[0].startswith(CLEAR[code]) and lines[1].startswith("hint: "), ended.errors
    assert "Traceback" not in ended.errors


def _fails_and_goes_on(kind: Kind, home: Path, wanted, moments, code):
    for number in moments:
        folder = home / f"at-{number}"
        folder.mkdir()
        kind.prepare(folder)
        ended = command(*kind.words(folder), cwd=folder, fault=partial(faults_injected.fail_at, str(folder), number, code))
        _refused(ended, code)
        ended = command(*kind.words(folder), cwd=folder)
        assert ended.code == 0, f"after a failure at operation {number}: {ended.errors}"
        assert kind.result(folder) == wanted, f"after a failure at operation {number}"


@pytest.mark.parametrize(("name", "code"), [("training", errno.ENOSPC), ("caching", errno.ENOSPC), ("caching", errno.EROFS)])
def test_no_room_and_no_permission_at_a_random_operation(name, code, whole, tmp_path):
    """The first operation, the last, and a random one; for everybody, also without root (the operations of the process are refused)."""
    wanted, _, count, _ = whole(name)
    draw = random.Random(f"{name}{code}")
    _fails_and_goes_on(KINDS[name], tmp_path, wanted, [draw.randrange(1, count - 1)], code)


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("name", ["training", "caching", "experts", "comparison"])
def test_no_room_and_no_permission_many_times(name, code, whole, tmp_path):
    """The first and the last operation and ten between."""
    wanted, _, count, _ = whole(name)
    draw = random.Random(f"{name}{code} many")
    _fails_and_goes_on(KINDS[name], tmp_path, wanted, [0, count - 1, *draw.sample(range(1, count - 1), 10)], code)


UNSHARED = """
set -e
mount -t tmpfs -o size={size} tmpfs disk
"$PYTHON" -m limbeck run r.yaml --out disk/out --quiet > first.txt 2>&1 && echo 0 > first.code || echo $? > first.code
{mend}
"$PYTHON" -m limbeck run r.yaml --out disk/out --quiet $([ -e disk/out/recipe.yaml ] && echo --resume) > second.txt 2>&1
cp -r disk/out out
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "mend"),
    [("120k", "mount -o remount,size=50m disk"), ("50m,ro", "mount -o remount,rw disk")],
    ids=["full", "read-only"],
)
def test_a_real_small_disk(size, mend, whole, tmp_path):
    """A file system in memory that is too small, or mounted read-only, and then is not any more. Needs user namespaces."""
    import os

    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here: `unshare -rm` is not permitted")
    wanted, *_ = whole("training")
    KINDS["training"].prepare(tmp_path)
    (tmp_path / "disk").mkdir()
    env = {**os.environ, "PYTHON": sys.executable, "LIMBECK_CACHE": str(tmp_path / "cache")}
    script = UNSHARED.format(size=size, mend=mend)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr + (tmp_path / "second.txt").read_text()
    errors = (tmp_path / "first.txt").read_text()
    assert (tmp_path / "first.code").read_text().strip() == "2" and errors.startswith("error: ") and "Traceback" not in errors, errors
    assert KINDS["training"].result(tmp_path) == wanted


def test_nothing_but_printed_times_depends_on_the_clock(whole, tmp_path):
    """`time.time` jumps by days at every call: same bits, same log, and no checkpoint that was not asked for."""
    wanted, seconds, *_ = whole("training")
    KINDS["training"].prepare(tmp_path)
    words = KINDS["training"].words(tmp_path)
    ended = command(*words, cwd=tmp_path, fault=partial(faults_injected.mad_clock, 3), kill_after=0.6 * seconds)
    words = KINDS["training"].words(tmp_path)
    ended = command(*words, cwd=tmp_path, fault=partial(faults_injected.mad_clock, 4)) if ended.code else ended
    assert ended.code == 0 and KINDS["training"].result(tmp_path) == wanted, ended.errors
    rare = [*KINDS["training"].words(tmp_path)[:2], "--out", "rare", "--quiet", "--set", "checkpoints={every_seconds: 5000}"]
    assert command(*rare, cwd=tmp_path, fault=partial(faults_injected.mad_clock, 5)).code == 0
    assert [path.name for path in sorted((tmp_path / "rare/checkpoints/student").glob("step-*"))] == ["step-00000150"]
    assert digests(tmp_path / "rare", "student/*.safetensors") == digests(tmp_path / "out", "student/*.safetensors")


def test_a_second_run_in_the_folder_is_locked_out_and_harms_nothing(whole, tmp_path):
    """Two more commands come while the first works: exit code 2, and the first ends as if nobody had come."""
    wanted, *_ = whole("training")
    kind = replace(KINDS["training"], words=lambda folder: ["run", "r.yaml", "--out", "out", "--quiet"])
    kind.prepare(tmp_path)
    first = []
    thread = threading.Thread(target=lambda: first.append(command(*kind.words(tmp_path), cwd=tmp_path)))
    thread.start()
    while not (tmp_path / "out/log.jsonl").exists() and thread.is_alive():
        time.sleep(0.01)
    other = tmp_path / "other"
    other.mkdir()
    for more in ([], ["--resume"]):
        second = command("run", "../r.yaml", "--out", "../out", "--quiet", *more, cwd=other, cache=tmp_path / "cache")
        assert second.code == 2 and "error: another run works in" in second.errors, second.errors
    thread.join()
    assert first[0].code == 0 and kind.result(tmp_path) == wanted, first[0].errors


def test_a_torn_last_line_is_mended(whole, tmp_path):
    """The log of a killed run ends in half a line, and its newest checkpoint lies before its last lines: every record stands there once."""
    wanted, seconds, *_ = whole("training")
    kind = KINDS["training"]
    kind.prepare(tmp_path)
    command(*kind.words(tmp_path), cwd=tmp_path, kill_after=0.7 * seconds)
    log = tmp_path / "out/log.jsonl"
    if log.exists():
        log.write_bytes(log.read_bytes() + b'{"phase": "student", "step": 14')
    assert command(*kind.words(tmp_path), cwd=tmp_path).code == 0
    records = log_of(tmp_path / "out")
    assert records == wanted["log"]
    assert len({(r["phase"], r["step"], *sorted(r)) for r in records}) == len(records)


def test_what_is_compared_would_notice(whole, tmp_path):
    """One bit of an artifact, one record of a log, one temporary file left over: each makes the result another."""
    kind, (wanted, _, _, folder) = KINDS["training"], whole("training")
    out = tmp_path / "whole/out"
    shutil.copytree(folder / "out", out)
    weights = out / "student/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    for path, changed in ((weights, bytes(content)), (out / "log.jsonl", (out / "log.jsonl").read_bytes() * 2), (out / "left.tmp", b"")):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(changed)
        assert kind.result(tmp_path / "whole") != wanted
        path.unlink() if before is None else path.write_bytes(before)
    assert kind.result(tmp_path / "whole") == wanted


def test_errors_of_the_system_in_other_libraries_are_clear(tmp_path):
    """safetensors tells the number of a system error in its message alone: a limit on the size of files, in a child, and other mistakes."""
    from safetensors import SafetensorError

    from limbeck.errors import of_system

    ended = child(_over_the_limit, str(tmp_path), cwd=tmp_path)
    assert ended.code == 0, ended.errors
    assert of_system(SafetensorError("header too small")) is None and of_system(ValueError("os error 28")) is None
    assert "at a/b" in of_system(OSError(errno.ENOSPC, "No space left on device", "a/b")).message


def _over_the_limit(folder):
    """Write a file of 256 KiB where 64 KiB are allowed."""
    import resource
    import signal

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from limbeck.errors import of_system

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        save_file({"w": torch.zeros(1 << 16)}, f"{folder}/w.safetensors")
    except SafetensorError as error:
        assert of_system(error).message.startswith("a file grew beyond what is allowed"), error
    else:
        raise AssertionError("nothing was refused")


def test_a_teacher_has_one_fingerprint_before_and_after_it_is_saved(tmp_path):
    """transformers writes into a model's configuration when it saves it; a store begun by the process that trained the teacher goes on."""
    from limbeck import zoo
    from limbeck.signals.store import model_fingerprint
    from limbeck.zoo.language import Tokens

    tokens = Tokens(64, 16, "causal-lm", 0, 1, 2, None)
    made = zoo.build("llama", tokens=tokens, layers=1, width=16, heads=2)
    before = model_fingerprint(made)
    zoo.save_model(made, tmp_path / "kept")
    found = zoo.load_model(tmp_path / "kept", model=zoo.build("llama", tokens=tokens, layers=1, width=16, heads=2))
    assert before == model_fingerprint(made) == model_fingerprint(found)


def test_the_wait_that_a_server_asks_for_is_counted_by_its_own_clock():
    """`Retry-After` as a date is taken from the reply's `Date`, so that a clock that is days off asks for no wait of days."""
    from limbeck.endpoint.pace import retry_after

    reply = {"retry-after": "Sat, 01 Jan 2000 00:00:07 GMT", "date": "Sat, 01 Jan 2000 00:00:00 GMT"}
    assert retry_after(reply) == 7.0
