"""A limit of cost that holds while several requests are under way."""

from __future__ import annotations

import threading
from typing import Any

from limbeck.endpoint.failures import Failure
from limbeck.endpoint.settings import EndpointSettings, Request, count_tokens, money

_BILLED = ("timeout", "connection", "malformed")  # the server may have done the work


class Purse:
    """Sets money aside for the longest answer before each request and puts back what was not spent.

    Args:
        settings: prices and the longest answer.
        limit: most money to spend, None for no limit.
    """

    def __init__(self, settings: EndpointSettings, limit: float | None) -> None:
        self.settings, self.limit = settings, limit
        self.spent = 0.0
        self.empty = False
        self._aside = 0.0
        self._under_way = 0
        self._change = threading.Condition()

    def reserve(self, request: Request, stop: threading.Event) -> float | None:
        """Set money aside for one attempt, waiting for others to end if it does not fit yet; None when it will not fit, or at `stop`."""
        if self.limit is None:
            return 0.0
        most = money(self.settings, count_tokens(self.settings, request), self.settings.max_tokens) or 0.0
        with self._change:
            while self.spent + self._aside + most > self.limit * (1 + 1e-9):
                if not self._under_way:
                    self.empty = True
                    return None
                if stop.is_set():
                    return None
                self._change.wait(0.1)
            self._aside += most
            self._under_way += 1
        return most

    def settle(self, reserved: float, request: Request, found: dict[str, Any] | None, failure: Failure | None) -> None:
        """Replace what was set aside by what it cost; a request that broke off may have been billed and counts in full."""
        if self.limit is None:
            return
        if found is not None:
            prompt, said = found["prompt_tokens"], found["completion_tokens"]
            prompt = count_tokens(self.settings, request) if prompt is None else prompt
            cost = money(self.settings, prompt, self.settings.max_tokens if said is None else said) or 0.0
        else:
            cost = reserved if failure is not None and failure.kind in _BILLED else 0.0
        with self._change:
            self.spent += cost
            self._under_way -= 1
            self._aside = self._aside - reserved if self._under_way else 0.0
            self._change.notify_all()
