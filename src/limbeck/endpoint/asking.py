"""One call of `Endpoint.ask` under way: threads, repeats, the limit of cost, and what is said when something stays unanswered."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from limbeck.endpoint.failures import Failure
from limbeck.endpoint.pace import wait_before
from limbeck.endpoint.settings import Request
from limbeck.endpoint.spending import Purse
from limbeck.errors import UserError

if TYPE_CHECKING:
    from limbeck.endpoint.endpoint import Endpoint

HURRY, PATIENCE = 2.0, 10.0
"""Seconds in which answers under way may still arrive and are kept: after Ctrl-C, and after a failure that ends the job."""

_SERVER = ("connection", "timeout", "status", "malformed")


class Asking:
    """Sends what is missing; the threads write the log, the calling thread counts and decides when to end.

    Args:
        endpoint: who sends.
        missing: question by key.
        times: how many requests each key answers.
        total: number of requests.
        progress: see `Endpoint.ask`.
        limit_cost: see `Endpoint.ask`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        missing: dict[str, Request],
        times: Counter[str],
        total: int,
        progress: Callable[[int, int], Any] | None,
        limit_cost: float | None,
    ) -> None:
        self.endpoint, self.missing, self.times, self.total = endpoint, missing, times, total
        self.progress, self.purse = progress, Purse(endpoint.settings, limit_cost)
        self.failures: dict[str, Failure] = {}
        self._succeeded = False
        self._in_a_row = 0
        self._stop = threading.Event()
        self._todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[str | None, Failure | BaseException | None]] = queue.SimpleQueue()

    def run(self) -> None:
        """Ask for everything that is missing.

        Raises:
            UserError: something stays unanswered.
        """
        order = list(self.missing)
        self.endpoint.chance.shuffle(order)  # so that a stretch of prompts that fail is not taken for all of them (`_hopeless`)
        for key in order:
            self._todo.put(key)
        count = min(self.endpoint.settings.concurrency, len(self.missing))
        threads = [threading.Thread(target=self._work, daemon=True, name=f"ask-{n}") for n in range(count)]
        ended, patience = None, HURRY
        try:
            self._tell()
            for thread in threads:
                thread.start()
            ended = self._collect(count)
            patience = PATIENCE
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(patience / count)
        self._report(ended)

    def _tell(self) -> None:
        if self.progress is not None:
            left = sum(self.times[key] for key in self.missing if key not in self.endpoint.log)
            self.progress(self.total - left, self.total)

    def _collect(self, working: int) -> Failure | None:
        """Count what comes back until all threads have ended; the failure that ends the job, if one does."""
        while working:
            key, result = self._done.get()
            if isinstance(result, BaseException):
                raise result
            if key is None:
                working -= 1
            elif result is None:
                self._in_a_row, self._succeeded = 0, True
                self._tell()
            else:
                self.failures[key] = result
                if result.ends or self._hopeless() or self._lost(result):
                    return result
        return None

    def _hopeless(self) -> bool:
        """Whether nothing at all succeeds, each time with the same words: not a matter of the prompts."""
        enough = max(16, 2 * self.endpoint.settings.concurrency)
        return not self._succeeded and len(self.failures) >= enough and len({failure.message for failure in self.failures.values()}) == 1

    def _lost(self, failure: Failure) -> bool:
        """Whether the server seems gone: several failures in a row that no prompt explains, and not even its list of models comes."""
        self._in_a_row += failure.kind in _SERVER
        if self._in_a_row < max(4, self.endpoint.settings.concurrency):
            return False
        self._in_a_row = 0
        found = self.endpoint.models()
        return isinstance(found, Failure) and found.kind in ("connection", "timeout", "malformed")

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    key = self._todo.get_nowait()
                except queue.Empty:
                    break
                if not self._one(key):
                    break
        except BaseException as error:
            self._done.put((None, error))
        else:
            self._done.put((None, None))

    def _one(self, key: str) -> bool:
        """Ask until there is an answer or no repeat is left; False when the thread shall end."""
        endpoint, request, repeat = self.endpoint, self.missing[key], 0
        while True:
            reserved = self.purse.reserve(request, self._stop)
            if reserved is None or not endpoint.pace.take(self._stop) or self._stop.is_set():
                return False
            found, failure = endpoint.send(request)
            self.purse.settle(reserved, request, found, failure)
            if failure is None:
                kept = endpoint.log.append({"key": key, "id": request.id, "model": endpoint.settings.model, **found})
                self._done.put((key, None))
                return kept
            if not failure.again or repeat >= endpoint.settings.retries:
                self._done.put((key, failure))
                return True
            repeat += 1
            wait = wait_before(repeat, endpoint.chance)
            if failure.wait is not None:
                wait = max(wait, failure.wait)
                endpoint.pace.hold(failure.wait)
            if not endpoint.wait(wait, self._stop):
                return False

    def _report(self, ended: Failure | None) -> None:
        """Raise what the user must know when something stays unanswered."""
        log = self.endpoint.log
        left = [key for key in self.missing if key not in log]
        if not left:
            return
        missing = sum(self.times[key] for key in left)
        kept = f"{missing} of {self.total} requests are not answered"
        again = f"the other {self.total - missing} are kept in {log.path}; running again asks only for the missing ones"
        if ended is None and self.purse.empty:
            raise UserError(f"{kept}: the limit of cost ({self.purse.limit:g}) is reached", f"raise limit_cost; {again}")
        if ended is not None:
            ended = self.endpoint.explain(ended)
            raise UserError(f"{ended.message}; {kept}", f"{ended.hint}; {again}")
        kind, count = Counter(failure.kind for failure in self.failures.values()).most_common(1)[0]
        key, failure = next((key, failure) for key, failure in self.failures.items() if failure.kind == kind)
        others = f", {len(self.failures) - count} of them for other reasons" if count < len(self.failures) else ""
        first = self.missing[key].id
        raise UserError(f"{kept}{others}: {failure.message} (first: request {first!r})", f"{failure.hint}; {again}")
