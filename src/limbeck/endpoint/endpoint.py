"""Ask a language model behind an OpenAI-compatible interface, once per question, with every answer kept in a log."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.endpoint.answers import Answer, Malformed, answer_of, read_reply
from limbeck.endpoint.asking import Asking
from limbeck.endpoint.failures import Failure, failure_of
from limbeck.endpoint.log import ResponseLog
from limbeck.endpoint.pace import Pace
from limbeck.endpoint.settings import EndpointSettings, Estimate, Request, check_requests, count_tokens, money
from limbeck.errors import UserError, nearest


class Endpoint:
    """A language model behind an OpenAI-compatible interface.

    Args:
        settings: whom to ask and how.
        log: file of the answers (see `ResponseLog`); several models and settings may share one.
        client: a ready `openai.OpenAI`; None makes one from the settings at the first request.
        clock: seconds that only grow; for tests.
        sleep: waits so many seconds; for tests. The default can be broken off.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        log: str | Path,
        client: Any = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        self.settings, self.log = settings, ResponseLog(log)
        self._client = client if client is None else client.with_options(max_retries=0)
        self._clock = clock
        self._own_sleep = sleep
        self.pace = Pace(settings.requests_per_minute, clock, self.wait)
        self.chance = random.Random()  # its own, so that nothing else draws other numbers
        self._one_call = threading.Lock()
        self._making = threading.Lock()

    def __repr__(self) -> str:
        return f"Endpoint({self.settings!r}, log={str(self.log.path)!r})"

    def wait(self, seconds: float, stop: threading.Event | None = None) -> bool:
        """Wait so many seconds, at most until `stop` is set; False when it is."""
        stop = stop or threading.Event()
        if self._own_sleep is None:
            return not stop.wait(seconds)
        self._own_sleep(seconds)
        return not stop.is_set()

    def client(self) -> Any:
        """The `openai.OpenAI` that sends; it never repeats by itself.

        Raises:
            UserError: the package is missing, or the key cannot be sent.
        """
        with self._making:
            if self._client is None:
                self._client = _make_client(self.settings)
            return self._client

    def probe(self) -> list[str]:
        """The names of the models on offer, by one cheap request: whether the server is there and takes the key, before a long job.

        The list need not hold `settings.model`: some servers load models that they do not list.

        Raises:
            UserError: no connection, a key that is not accepted, or an address where no such list is.
        """
        names = self.models()
        if isinstance(names, Failure):
            raise names.error()
        return names

    def models(self) -> list[str] | Failure:
        """As `probe`, but a failure is returned."""
        self.pace.take()
        try:
            reply = self.client().models.with_raw_response.list()
            return _model_names(reply.http_response.content)
        except UserError:
            raise
        except Exception as error:
            failure = failure_of(self.settings, error)
            if failure.kind == "missing":
                hint = "base_url usually ends in /v1; check it"
                return Failure("missing", f"{self.settings.base_url} has no list of models (HTTP 404)", hint, again=False, ends=True)
            return failure

    def send(self, request: Request) -> tuple[dict[str, Any] | None, Failure | None]:
        """One attempt, not kept: the fields of the answer with the seconds it took, or why there is none."""
        body, chat = self.settings.body(request), self.settings.chat
        start = self._clock()
        try:
            client = self.client()
            maker = client.chat.completions if chat else client.completions
            reply = maker.with_raw_response.create(**body)
            found = read_reply(reply.http_response.content, chat)
            # a server may echo the key
            found |= {name: self.settings.hide(found[name]) for name in ("text", "finish_reason") if found[name]}
        except UserError:
            raise
        except Exception as error:
            return None, failure_of(self.settings, error)
        return {**found, "seconds": round(self._clock() - start, 3)}, None

    def estimate(self, requests: Sequence[Request], tokenizer: Any = None) -> Estimate:
        """What `ask` would send, before anything is sent.

        Args:
            requests: as for `ask`.
            tokenizer: anything with `encode(text)`; without it tokens are guessed from bytes (see `count_tokens`).
        """
        settings, requests = self.settings, list(requests)
        check_requests(settings, requests)
        self.log.read()
        keys = [settings.key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.log}
        prompt = sum(count_tokens(settings, request, tokenizer) for request in missing.values())
        most = len(missing) * settings.max_tokens
        paces = [len(missing) * self.pace.gap] if settings.requests_per_minute else []
        took = [record["seconds"] for record in self.log.records() if record.get("model") == settings.model]
        if took:
            paces.append(len(missing) * statistics.median(took) / settings.concurrency)
        answered = sum(key in self.log for key in keys)
        seconds = max(paces) if paces else None
        return Estimate(len(requests), answered, len(missing), prompt, most, money(settings, prompt, most), seconds)

    def ask(
        self,
        requests: Sequence[Request],
        progress: Callable[[int, int], Any] | None = None,
        limit_cost: float | None = None,
    ) -> list[Answer]:
        """The answers, in the order of the requests; only what the log lacks is sent, and the same question only once.

        Each answer is on the disk before it counts; Ctrl-C, a kill or a failure loses none of them. Calls from several threads take turns.

        Args:
            requests: ids must differ, prompts may repeat.
            progress: called with (requests answered, requests) at the start and after each answer, in the calling thread.
            limit_cost: most money this call may spend. A request is only sent when the longest answers to it and to those under way
                would still fit; prompt tokens count as in `estimate` until the server tells.

        Raises:
            UserError: requests stay unanswered (how many, why; running again asks only for those), nothing but empty answers or more
                than `settings.most_empty` of them, the limit of cost reached, or an altered log.
        """
        requests = list(requests)
        check_requests(self.settings, requests)
        if limit_cost is not None and money(self.settings, 0, 0) is None:
            raise UserError("limit_cost needs prices", "set price_input and price_output (money per million tokens)")
        keys = [self.settings.key(request) for request in requests]
        with self._one_call, self.log.writing():
            missing: dict[str, Request] = {}
            for key, request in zip(keys, requests, strict=True):
                if key not in self.log:
                    missing.setdefault(key, request)
            if missing:
                Asking(self, missing, Counter(keys), len(requests), progress, limit_cost).run()
            elif progress is not None:
                progress(len(requests), len(requests))
        answers = [answer_of(request.id, self.log.get(key)) for request, key in zip(requests, keys, strict=True)]
        self._check_empty(answers)
        return answers

    def _check_empty(self, answers: list[Answer]) -> None:
        empty = [answer for answer in answers if answer.empty]
        if not empty or (len(empty) < len(answers) and len(empty) <= self.settings.most_empty * len(answers)):
            return
        reasons = Counter(str(answer.finish_reason) for answer in empty).most_common(3)
        said = ", ".join(f"{count} times {reason!r}" for reason, count in reasons)
        raise UserError(
            f"{len(empty)} of {len(answers)} answers of {self.settings.model} are empty (finish_reason {said})",
            "look at stop and max_tokens, at the prompt's form, or try chat=False for a model without a chat template",
        )

    def explain(self, failure: Failure) -> Failure:
        """A failure with what only another question to the server can tell: which models there are after a 404."""
        if failure.kind != "missing":
            return failure
        settings, names = self.settings, self.models()
        if isinstance(names, Failure):
            return replace(failure, hint="check base_url: it usually ends in /v1, and there is no list of models there")
        if settings.model in names:
            path, other = ("/chat/completions", False) if settings.chat else ("/completions", True)
            return replace(failure, message=f"{settings.base_url} has the model {settings.model} and no {path}", hint=f"try chat={other}")
        offer = ", ".join(nearest(settings.model, names, 5)) or "none"
        what = f"{settings.base_url} does not have the model {settings.model!r}"
        return replace(failure, message=what, hint=f"it offers {len(names)}: {offer}")


def _make_client(settings: EndpointSettings) -> Any:
    try:
        import openai
    except ImportError:
        raise UserError("openai is not installed", "`pip install 'limbeck[endpoint]'`") from None
    headers = {}
    if settings.credentials:
        headers["Authorization"] = f"Basic {settings.credentials.basic()}"
    return openai.OpenAI(
        base_url=settings.base_url,
        api_key=settings.api_key() or "none",  # the client wants one, servers without keys do not mind
        max_retries=0,
        timeout=openai.Timeout(settings.timeout, connect=min(settings.timeout, 10.0)),
        default_headers=headers,
    )


def _model_names(content: bytes) -> list[str]:
    import json

    try:
        return sorted({str(entry["id"]) for entry in json.loads(content)["data"]})
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Malformed("the list of models is not well formed") from None
