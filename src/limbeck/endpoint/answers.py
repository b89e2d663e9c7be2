"""Answers of a language model: read strictly from the server's JSON, so that a half answer never passes for a whole one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple


class TokenLog(NamedTuple):
    """A token of an answer.

    Args:
        token: its text.
        log: its log-probability (nats) under the server's model.
        top: the likeliest tokens at this place with their log-probabilities, likeliest first as the server gives them.
    """

    token: str
    log: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Args:
        id: of the request.
        text: as it came, nothing cut.
        finish_reason: "stop", "length", "content_filter" or what the server says; None when it says nothing.
        prompt_tokens, completion_tokens: as the server counted; None when it does not say.
        logprobs: one `TokenLog` a token, or None when not asked for or not given.
    """

    id: str
    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: list[TokenLog] | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing but white space."""
        return not self.text.strip()


class Malformed(Exception):
    """A reply that is not what the interface promises; says what is wrong."""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{what} is not a number")
    return float(value)


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Malformed(f"usage.{name} is not a count")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{what} is not text")
    return value


def _chat_logs(found: Any) -> list[TokenLog] | None:
    if not isinstance(found, dict) or found.get("content") is None:
        return None
    logs = []
    for entry in found["content"]:
        top = [(_text(t["token"], "a token"), _number(t["logprob"], "a logprob")) for t in entry.get("top_logprobs") or []]
        logs.append(TokenLog(_text(entry["token"], "a token"), _number(entry["logprob"], "a logprob"), tuple(top)))
    return logs


def _plain_logs(found: Any) -> list[TokenLog] | None:
    if not isinstance(found, dict) or found.get("tokens") is None or found.get("token_logprobs") is None:
        return None
    tokens, values = found["tokens"], found["token_logprobs"]
    tops = found.get("top_logprobs") or [None] * len(tokens)
    if not len(tokens) == len(values) == len(tops):
        raise Malformed("logprobs has lists of unequal lengths")
    logs = []
    for token, value, top in zip(tokens, values, tops, strict=True):
        pairs = tuple((_text(name, "a token"), _number(log, "a logprob")) for name, log in (top or {}).items())
        logs.append(TokenLog(_text(token, "a token"), _number(value, "a logprob"), pairs))
    return logs


def read_reply(content: bytes, chat: bool) -> dict[str, Any]:
    """The fields of an answer (as in `Answer`, without the id) from the body of a reply.

    Raises:
        Malformed: not JSON, or a field is missing or of the wrong kind.
    """
    try:
        reply = json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        page = content.lstrip()[:1] == b"<"
        raise Malformed("the reply is a web page, not JSON" if page else "the reply is not JSON") from None
    if not isinstance(reply, dict):
        raise Malformed("the reply is not a JSON object")
    if reply.get("error"):
        error = reply["error"]
        said = error.get("message", error) if isinstance(error, dict) else error
        raise Malformed(f"the reply is an error: {str(said)[:200]}")
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Malformed("the reply has no choices")
    choice = choices[0]
    if chat:
        message = choice.get("message")
        if not isinstance(message, dict) or not {"content", "role"} & message.keys():
            raise Malformed("the reply has no message")
        text = message.get("content")
        text = "" if text is None else text
    else:
        if "text" not in choice:
            raise Malformed("the reply has no text")
        text = choice["text"]
    reason = choice.get("finish_reason")
    try:
        logs = (_chat_logs if chat else _plain_logs)(choice.get("logprobs"))
    except (KeyError, TypeError, AttributeError):
        raise Malformed("the reply's logprobs are not well formed") from None
    return {
        "text": _text(text, "the answer"),
        "finish_reason": None if reason is None else _text(reason, "finish_reason"),
        "prompt_tokens": _count(reply.get("usage"), "prompt_tokens"),
        "completion_tokens": _count(reply.get("usage"), "completion_tokens"),
        "logprobs": logs,
    }


def answer_of(request: str, record: dict[str, Any]) -> Answer:
    """The answer to the request of that id, from fields as `read_reply` gives them or as the log keeps them."""
    logs = record["logprobs"]
    if logs is not None:
        logs = [TokenLog(token, log, tuple((name, value) for name, value in top)) for token, log, top in logs]
    return Answer(request, record["text"], record["finish_reason"], record["prompt_tokens"], record["completion_tokens"], logs)
