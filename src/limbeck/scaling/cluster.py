"""Ray: the one place that starts it or joins a running cluster, and counts what it has."""

from __future__ import annotations

import io
import logging
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TextIO

from limbeck.errors import UserError
from limbeck.scaling.sizing import Sizing, processors

OBJECTS = 128 * 2**20
"""Bytes of the object store of a cluster that is started here: what travels is a few numbers a piece of work."""

PATIENCE, HEALTH = 5.0, 30.0
"""Seconds that an address gets to answer, and that Ray's own health check may take with its start."""


@dataclass(frozen=True)
class Fleet:
    """What a cluster lends: how many workers, and the processors and accelerators of each."""

    workers: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        many = "workers" if self.workers > 1 else "worker"
        return f"{self.workers} {many} with {self.cpus:g} processors" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


def require() -> Any:
    """Ray itself.

    Raises:
        UserError: it is not installed.
    """
    # read when Ray is imported: no reports to its makers, no lines of its own between ours
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray: {error}", "pip install 'limbeck[ray]'") from None
    for name in ("ray", "ray.data", "ray.serve", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray


def ready(sizing: Sizing) -> None:
    """Find what is missing before any work begins.

    Raises:
        UserError: Ray is not installed, or nobody answers at the address.
    """
    if sizing.engine == "ray" and not require().is_initialized() and sizing.address is not None:
        _reach(sizing.address)


@contextmanager
def cluster(sizing: Sizing, threads: int, gpu: bool) -> Iterator[Fleet]:
    """A cluster for the time of a command: the one at `sizing.address`, the one that this process is in already, or one started here.

    Args:
        sizing: how many workers of what size.
        threads: with which each computes.
        gpu: whether they compute on an accelerator.

    Raises:
        UserError: Ray is not installed or cannot be started, nobody answers at the address, or no machine has room for a worker.
    """
    ray = require()
    gpus = sizing.gpus if sizing.gpus is not None else float(gpu)
    mine = not ray.is_initialized()
    if mine and sizing.address is None:
        cpus = _share(sizing, threads, processors(), gpus)
        count = sizing.workers or max(1, int(processors() // cpus))
        own = {"address": "local", "num_cpus": math.ceil(count * cpus), "object_store_memory": OBJECTS, "include_dashboard": False}
        _begin(ray, "a cluster cannot be started here", **own)
    elif mine:
        ready(sizing)
        _begin(ray, f"the cluster at {sizing.address} cannot be joined", address=sizing.address)
    with redirect_stdout(_OfThisThread(sys.stdout)):
        try:
            yield _fleet(ray, sizing, threads, gpus)
        finally:
            if mine:
                ray.shutdown()


def _fleet(ray: Any, sizing: Sizing, threads: int, gpus: float) -> Fleet:
    room = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = _share(sizing, threads, int(sum(node.get("CPU", 0) for node in room)), gpus)
    return Fleet(_workers(sizing, room, cpus, gpus), cpus, gpus)


class _OfThisThread(io.TextIOBase):
    """Standard output for this thread only: Ray prints the state of its processes from threads of its own, between our results."""

    def __init__(self, below: TextIO) -> None:
        self.below, self.thread = below, threading.get_ident()

    def write(self, text: str) -> int:
        return self.below.write(text) if threading.get_ident() == self.thread else len(text)

    def flush(self) -> None:
        self.below.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)


@contextmanager
def _hushed() -> Iterator[None]:
    """No lines on standard error from the part of Ray that is not Python; what goes wrong comes as an exception."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _share(sizing: Sizing, threads: int, total: int, gpus: float) -> float:
    """Processors of one worker: those of its threads; one where a GPU computes; with a number of workers, its share of all."""
    if sizing.cpus is not None:
        return sizing.cpus
    share = total // sizing.workers if sizing.workers else 1 if gpus else min(threads, total)
    return float(max(1, share))


def _begin(ray: Any, what: str, **arguments: Any) -> None:
    try:
        with _hushed():
            ray.init(log_to_driver=False, logging_level="ERROR", **arguments)
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except Exception as error:  # Ray fails in many ways, each with a text of its own
        ray.shutdown()
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{what}: {text[:300]}", "`ray status` shows a running cluster; all machines need the same Ray and Python"
        ) from None


@lru_cache
def _reach(address: str) -> None:
    """See whether Ray listens at HOST:PORT; Ray itself would wait for minutes, and for ever where something else listens.

    Raises:
        UserError: it does not, or it is no such address.
    """
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is an address of Ray Client",
            "run the command on a machine of the cluster (or with `ray job submit`), --address auto",
        )
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--address {address} is no address", "give auto, or HOST:PORT such as 10.0.0.1:6379 (`ray start --head` tells it)")
    hint = "start a cluster with `ray start --head`, or leave --address away to start one on this machine"
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        raise UserError(f"nobody answers at {address}: {error.strerror or error}", hint) from None
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        silent = "Timed out" in subprocess.run(words, capture_output=True, text=True, timeout=HEALTH).stderr
    except subprocess.TimeoutExpired:
        silent = True
    if silent:
        raise UserError(f"whoever answers at {address} is no cluster of Ray", hint)


def _workers(sizing: Sizing, room: list[dict[str, float]], cpus: float, gpus: float) -> int:
    """How many workers find room; never more than are asked for."""

    def fit(node: dict[str, float]) -> int:
        ways = [node.get("CPU", 0) / cpus, *([node.get("GPU", 0) / gpus] if gpus else [])]
        return int(min(ways) + 1e-9)

    places = sum(fit(node) for node in room)
    if places == 0:
        have = max(room, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
        raise UserError(
            f"a worker needs {cpus:g} processors and {gpus:g} GPUs; the largest machine of the cluster has "
            f"{have.get('CPU', 0):g} and {have.get('GPU', 0):g}",
            "ask for less with --worker-cpus and --worker-gpus",
        )
    return min(places, sizing.workers or places)


def ended_badly(error: Exception, what: str) -> Exception:
    """What to raise for an error that ended work on a cluster: a `UserError` where machines or processes were lost, else the error."""
    from ray import exceptions

    causes: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and here not in causes:
        causes.append(here)
        here = getattr(here, "cause", None) or here.__cause__
    lost = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.ObjectLostError)
    found = next((cause for cause in causes if isinstance(cause, (*lost, exceptions.RaySystemError, exceptions.OutOfMemoryError))), None)
    if found is None:
        return error
    text = next((line.strip() for line in str(found).splitlines() if line.strip()), type(found).__name__)
    return UserError(
        f"{what} lost its workers or its cluster: {text[:200]}", "what was finished is kept; the same command goes on where it stopped"
    )
