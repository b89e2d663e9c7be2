"""When the next request may go: a token bucket, waits between repeats, and what the server asks for in Retry-After."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first repeat, and the most that doubling reaches."""


class Pace:
    """A token bucket of size one, shared by all threads: starts of requests are at least 60 / per_minute seconds apart.

    Args:
        per_minute: requests a minute, None for no limit.
        clock: seconds that only grow.
        sleep: waits so many seconds, at most until the event is set; False when it is.
    """

    def __init__(
        self, per_minute: float | None, clock: Callable[[], float], sleep: Callable[[float, threading.Event | None], bool]
    ) -> None:
        self.gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = -math.inf
        self._guard = threading.Lock()

    def take(self, stop: threading.Event | None = None) -> bool:
        """Wait for a turn; False when `stop` was set before it came."""
        with self._guard:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self.gap
        return turn <= now or self._sleep(turn - now, stop)

    def hold(self, seconds: float) -> None:
        """Let no request start for so many seconds."""
        with self._guard:
            self._next = max(self._next, self._clock() + seconds)


def wait_before(repeat: int, chance: random.Random) -> float:
    """Seconds before repeat 1, 2, ...: 1, 2, 4, ... up to 60, each times a number drawn from 0.5 to 1 so that threads spread out."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(repeat - 1, 30)) * (0.5 + 0.5 * chance.random())


def _date(value: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a reply asks to wait: `retry-after-ms`, or `Retry-After` as seconds or as a date; None when it does not ask.

    Args:
        headers: of the reply; names in any case when the mapping allows it, else lower.
        now: the present time, with a time zone; for dates. By default the time of the reply itself (its header `Date`), so that a wrong
            clock here changes nothing.
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            date = _date(value)
            if date is None:
                continue
            seconds = (date - (now or _date(headers.get("date")) or datetime.now(UTC))).total_seconds()
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
