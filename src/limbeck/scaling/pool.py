"""Pieces of work in processes of this machine, a few at a time; a process that is killed is begun again a bounded number of times."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from limbeck.scaling.sizing import RETRIES
from limbeck.scaling.work import Ended

GRACE = 60.0
"""Seconds that a process gets to save its state after Ctrl-C."""

Process = subprocess.Popen[bytes]


class _Pool:
    """What the threads share that each lead one process: what is to do, what came of it, who is alive."""

    def __init__(self, work: str, items: Sequence[Any]) -> None:
        self.work, self.items = work, items
        self.open: queue.Queue[int] = queue.Queue()
        for place in range(len(items)):
            self.open.put(place)
        self.ended: queue.Queue[tuple[int, Ended]] = queue.Queue()
        self.alive: set[Process] = set()
        self.guard, self.stopping = threading.Lock(), False

    def lead(self) -> None:
        """Lead one process after another through what is open."""
        process: Process | None = None
        try:
            while True:
                place = self.open.get_nowait()
                process, ended = self._one(process, self.items[place])
                self.ended.put((place, ended))
        except queue.Empty:
            pass
        except Exception as error:  # nobody looks at this thread: a silent end would be waited for in vain
            self.ended.put((place, {"status": "fault", "message": f"{type(error).__name__}: {error}", "trace": ""}))
        finally:
            if process is not None:
                self._end(process)

    def _one(self, process: Process | None, item: Any) -> tuple[Process | None, Ended]:
        """One piece of work, in the process at hand or a new one; gives back the process if it is still alive."""
        line, code = json.dumps({"work": self.work, "item": item}).encode() + b"\n", 0
        for _ in range(RETRIES + 1):
            process = process or self._begin()
            if process is None:
                return None, {"status": "interrupted"}
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            said = process.stdout.readline()
            if said.endswith(b"\n"):
                return process, json.loads(said)
            code = self._end(process)
            process = None
            if self.stopping:
                return None, {"status": "interrupted"}
            if code >= 0:
                return None, {"status": "fault", "message": f"its process ended with exit code {code} and said nothing", "trace": ""}
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return None, {"status": "killed", "message": f"its process was killed {RETRIES + 1} times, last by {name}"}

    def _begin(self) -> Process | None:
        with self.guard:
            if self.stopping:
                return None
            # a session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once
            words = [sys.executable, "-m", "limbeck.scaling.child"]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            self.alive.add(process)
            return process

    def _end(self, process: Process) -> int:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait()
        process.stdout.close()
        with self.guard:
            self.alive.discard(process)
        return code

    def stop(self) -> None:
        """Ask every process to save its state and end; after `GRACE` seconds it is killed."""
        with self.guard:
            self.stopping = True
            alive = list(self.alive)
        with contextlib.suppress(queue.Empty):
            while True:
                self.open.get_nowait()
        for process in alive:
            process.send_signal(signal.SIGINT)
        for process in alive:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def in_processes(work: str, items: Sequence[Any], workers: int) -> Iterator[tuple[int, Ended]]:
    """Do pieces of work in `workers` processes of this machine.

    Args:
        work: see `limbeck.scaling.work.carry_out`.
        items: one a piece; JSON can hold them.
        workers: how many at a time.

    Yields:
        place in `items` and how it ended, as they end.
    """
    pool, count = _Pool(work, items), min(workers, len(items))
    with ThreadPoolExecutor(count) as threads:
        try:
            for _ in range(count):
                threads.submit(pool.lead)
            for _ in items:
                yield pool.ended.get()
        except BaseException:  # Ctrl-C, or nobody wants the rest
            pool.stop()
            raise
