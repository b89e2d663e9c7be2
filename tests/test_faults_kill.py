"""SIGKILL at random moments of every kind of work: after going on, no bit differs from the undisturbed run.

A failure names its seed, chain and moments; the same seed draws the same moments.
"""

import random
import shutil
import signal
from functools import partial

import pytest

from tests import faults_injected
from tests.faults import command, kill_and_resume, undisturbed
from tests.faults_kinds import KINDS

SHORT, LONG = 2, 50
"""Kills a kind in `make test` and in `make faults`."""


@pytest.mark.parametrize("name", KINDS)
def test_killed_work_goes_on_bit_for_bit(name, tmp_path):
    """A few kills of each kind."""
    kind = KINDS[name]
    wanted, seconds = undisturbed(kind, tmp_path / "whole")
    tally = kill_and_resume(kind, tmp_path, seed=7, kills=SHORT, wanted=wanted, seconds=seconds)
    assert tally.kills == SHORT and not tally.different, tally.different


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_killed_many_times(name, tmp_path):
    """Many kills of each kind."""
    kind = KINDS[name]
    wanted, _ = undisturbed(kind, tmp_path / "first")  # whose seconds have the start of the server in them
    again, seconds = undisturbed(kind, tmp_path / "whole")
    assert again == wanted
    tally = kill_and_resume(kind, tmp_path, seed=2025, kills=LONG, wanted=wanted, seconds=seconds)
    assert tally.kills >= LONG and not tally.different, tally.different


def _killed_at_the_end(tmp_path, numbers):
    """A run whose phases are done is killed at these operations of writing its results; None for all of them, one after the other."""
    kind = KINDS["training"]
    wanted, _ = undisturbed(kind, tmp_path / "whole")
    for left in ("summary.json", "report.html", "predictions.safetensors"):
        (tmp_path / "whole/out" / left).unlink()
    shutil.rmtree(tmp_path / "whole/out/student")
    number = 0
    while numbers is None or number < len(numbers):
        folder = tmp_path / f"at-{number}"
        shutil.copytree(tmp_path / "whole", folder)
        at = number if numbers is None else numbers[number]
        ended = command(*kind.words(folder), cwd=folder, fault=partial(faults_injected.die_at, str(folder), at, True))
        again = command(*kind.words(folder), cwd=folder)
        assert again.code == 0 and kind.result(folder) == wanted, f"killed at operation {at}: {again.errors}"
        assert (folder / "out/report.html").is_file()
        if ended.code != -signal.SIGKILL:
            return number
        number += 1
    return number


def test_killed_while_results_are_written(tmp_path):
    """At two random operations of writing student/, predictions, report.html and summary.json."""
    draw = random.Random(11)
    assert _killed_at_the_end(tmp_path, sorted(draw.sample(range(45), 2))) == 2


@pytest.mark.slow
def test_killed_at_every_operation_of_writing_results(tmp_path):
    """At each of them."""
    assert _killed_at_the_end(tmp_path, None) >= 40
