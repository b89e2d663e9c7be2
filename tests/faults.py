"""What the fault tests share: commands in forked children that are killed at chosen moments, and what a finished run is compared by.

A child is forked by a server process that has imported limbeck once, so that a start costs milliseconds and hundreds of kills are
affordable. It calls the entry of the command line, as the console script does.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults_child"])


@dataclass
class Ended:
    """How a child ended: exit code (negative: the signal that killed it), what it printed, and its seconds."""

    code: int
    errors: str
    seconds: float


def child(work: Callable[..., Any], *arguments: Any, cwd: Path, cache: Path | None = None, kill_after: float | None = None) -> Ended:
    """Run `work(*arguments)` in a forked child, in the folder `cwd`; send it SIGKILL after `kill_after` seconds."""
    from tests import faults_child

    with contextlib.chdir(Path(__file__).parent.parent):  # where the server finds what it imports
        forkserver.ensure_running()
    printed = cwd / ".printed"
    process = _context.Process(target=faults_child.enter, args=(work, arguments, str(cwd), str(cache or cwd / "cache"), str(printed)))
    process.start()
    began = time.monotonic()
    process.join(kill_after if kill_after is not None else 300)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    seconds = time.monotonic() - began
    return Ended(process.exitcode, printed.read_text(errors="replace") if printed.exists() else "", seconds)


def command(*words: Any, cwd: Path, cache: Path | None = None, kill_after: float | None = None, fault: Any = None) -> Ended:
    """`limbeck WORDS` in a forked child; `fault` is called in it before (see `tests.faults_child`)."""
    from tests import faults_child

    return child(faults_child.command, [str(word) for word in words], fault, cwd=cwd, cache=cache, kill_after=kill_after)


@dataclass
class Kind:
    """One kind of work that is killed.

    Attributes:
        words: the command, given the chain's folder; called again after each kill, it must go on.
        result: everything that must not differ, from the chain's folder.
        prepare: writes what the command reads.
    """

    words: Callable[[Path], Sequence[str]]
    result: Callable[[Path], dict[str, Any]]
    prepare: Callable[[Path], None]


@dataclass
class Tally:
    """Kills that hit a living process, runs that were finished afterwards, and in how many of them something differed."""

    kills: int = 0
    chains: int = 0
    different: list[str] = field(default_factory=list)


def undisturbed(kind: Kind, folder: Path) -> tuple[dict[str, Any], float]:
    """The result of a run that nobody disturbs, and its seconds."""
    folder.mkdir()
    kind.prepare(folder)
    ended = command(*kind.words(folder), cwd=folder)
    assert ended.code == 0, ended.errors
    return kind.result(folder), ended.seconds


def kill_and_resume(kind: Kind, home: Path, seed: int, kills: int, wanted: dict[str, Any], seconds: float, most: int = 4) -> Tally:
    """Chains of a start, up to `most` kills at random moments of its whole life, and an undisturbed end, until `kills` were made.

    A process that ends before its moment comes is not counted: its chain is over.
    """
    draw, tally = random.Random(seed), Tally()
    while tally.kills < kills:
        folder = home / f"chain-{seed}-{tally.chains}"
        folder.mkdir()
        kind.prepare(folder)
        moments: list[float] = []
        ended = None
        while len(moments) < most and tally.kills < kills:
            moments.append(round(draw.uniform(0, seconds), 4))
            ended = command(*kind.words(folder), cwd=folder, kill_after=moments[-1])
            if ended.code != -signal.SIGKILL:
                break
            tally.kills += 1
        if ended is None or ended.code != 0:
            ended = command(*kind.words(folder), cwd=folder)
        tally.chains += 1
        where = f"seed {seed}, chain {tally.chains - 1}, killed after {moments} of {seconds:.2f} s"
        if ended.code != 0:
            tally.different.append(f"{where}: exit code {ended.code}: {ended.errors[-2000:]}")
            continue
        found = kind.result(folder)
        names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        if names:
            tally.different.append(f"{where}: {', '.join(names)} differ in {folder}")
    print(f"{tally.kills} kills in {tally.chains} runs of {seconds:.2f} s (seed {seed}), {len(tally.different)} differ", file=sys.stderr)
    return tally


# ---- what is compared ----


def without(value: Any, *names: str) -> Any:
    """JSON data without the keys that tell time or place."""
    if isinstance(value, dict):
        return {key: without(item, *names) for key, item in value.items() if key not in names}
    if isinstance(value, list):
        return [without(item, *names) for item in value]
    return value


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of every file that matches, by its path."""
    from limbeck.storage import sha256

    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


def run_result(folder: Path) -> dict[str, Any]:
    """Artifacts, predictions, metrics and the log of a run folder; nothing that tells time. Also: no file is left over."""
    summary = json.loads((folder / "summary.json").read_text())
    found: dict[str, Any] = {**digests(folder, "*/*.safetensors"), **digests(folder, "*.safetensors")}
    assert found, f"nothing was made in {folder}"
    found["metrics"] = summary["metrics"]
    found["log"] = log_of(folder)
    found["left over"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tmp"))
    return found


def log_of(folder: Path) -> list[Any]:
    """The records of a log in their order, without times; every line must be whole."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [without(json.loads(line), "seconds", "rate") for line in lines]
