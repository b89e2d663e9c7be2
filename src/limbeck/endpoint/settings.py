"""What is asked, of whom and how: settings of an endpoint, requests, and the key that makes an answer reusable."""

from __future__ import annotations

import base64
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from limbeck.errors import UserError, keep_secret
from limbeck.storage import fingerprint

HIDDEN = "***"
"""What stands in texts where a secret would be."""


class Credentials:
    """User and password of an endpoint's address; neither its `repr` nor its `str` shows them.

    Args:
        user, password: as they stood in the address, percent signs decoded.
    """

    __slots__ = ("password", "user")

    def __init__(self, user: str, password: str) -> None:
        self.user, self.password = user, password

        keep_secret(password, self.basic())

    def basic(self) -> str:
        """As HTTP basic authentication sends them."""
        return base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def __repr__(self) -> str:
        return HIDDEN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credentials) and (self.user, self.password) == (other.user, other.password)

    def __hash__(self) -> int:
        return hash((self.user, self.password))


def _split_address(address: Any) -> tuple[str, Credentials | None]:
    """The address without credentials and without a slash at its end, and the credentials. Errors never show the address itself."""
    hint = "give the address of the API, for example http://localhost:8000/v1"
    try:
        parts = urlsplit(address.strip())
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError):
        raise UserError("base_url is not an address", hint) from None
    if parts.scheme not in ("http", "https") or not host:
        raise UserError("base_url must begin with http:// or https:// and name a host", hint)
    if parts.query or parts.fragment:
        raise UserError("base_url has a query or a fragment (? or #)", f"{hint}; a key belongs into the environment variable of key_env")
    place = f"[{host}]" if ":" in host else host
    netloc = place if port is None else f"{place}:{port}"
    credentials = None
    if parts.username is not None or parts.password is not None:
        credentials = Credentials(unquote(parts.username or ""), unquote(parts.password or ""))
    return urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", "")), credentials


@dataclass(frozen=True)
class EndpointSettings:
    """How a language model behind an OpenAI-compatible interface is asked.

    Args:
        base_url: address of the API, usually ending in /v1. User and password in it are moved into `credentials`.
        model: name of the model there.
        key_env: environment variable that holds the key. The key is read when it is needed and never kept here.
        chat: ask /chat/completions with messages; False asks /completions with plain text.
        concurrency: requests under way at once.
        requests_per_minute: requests are started at most this often, repeated ones included; None for no limit.
        timeout: seconds until a silent server counts as failed.
        retries: how often a failed request is repeated.
        max_tokens: longest answer in tokens.
        temperature, top_p: of sampling; 0.0 asks for greedy decoding; None leaves them to the server.
        stop: text or texts that end an answer.
        seed: of the server's sampling, where it has one. Another seed is another question: for several answers to one prompt, ask with
            several seeds.
        system: system message before every chat prompt that is plain text.
        price_input, price_output: money per million tokens, in any currency; None when unknown.
        logprobs: ask for the log-probabilities of the answer's tokens and of so many alternatives; None does not ask.
        token_limit_name: the field that carries `max_tokens`; newer OpenAI models want "max_completion_tokens".
        most_empty: share of empty answers above which `Endpoint.ask` raises; all empty always raises.
        credentials: user and password for HTTP basic authentication; they take the place of the key.

    Raises:
        UserError: a setting that cannot be meant.
    """

    base_url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    chat: bool = True
    concurrency: int = 4
    requests_per_minute: float | None = None
    timeout: float = 60.0
    retries: int = 5
    max_tokens: int = 256
    temperature: float | None = 0.0
    top_p: float | None = 1.0
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    system: str | None = None
    price_input: float | None = None
    price_output: float | None = None
    logprobs: int | None = None
    token_limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    most_empty: float = 0.5
    credentials: Credentials | None = None

    def __post_init__(self) -> None:
        address, credentials = _split_address(self.base_url)
        object.__setattr__(self, "base_url", address)
        if credentials is not None:
            object.__setattr__(self, "credentials", credentials)
        if self.stop is not None and not isinstance(self.stop, str):
            object.__setattr__(self, "stop", tuple(self.stop))
        self._check()

    def _check(self) -> None:
        if not self.model or not isinstance(self.model, str):
            raise UserError("no model is named", "give the model's name as the server knows it; `Endpoint.probe()` lists them")
        if not isinstance(self.key_env, str) or not self.key_env.isidentifier():
            raise UserError("key_env is not the name of an environment variable", "give the name (such as OPENAI_API_KEY), never the key")
        if self.system is not None and not self.chat:
            raise UserError("a system message needs chat=True", "put its text before the prompts, or set chat=True")
        if self.token_limit_name not in ("max_tokens", "max_completion_tokens"):
            raise UserError(f"token_limit_name {self.token_limit_name!r} is unknown", 'use "max_tokens" or "max_completion_tokens"')
        bounds = {
            "concurrency": (1, 1024), "requests_per_minute": (1e-3, math.inf), "timeout": (1e-3, math.inf), "retries": (0, 1000),
            "max_tokens": (1, 2**31), "temperature": (0, 100), "top_p": (0, 1), "price_input": (0, math.inf), "price_output": (0, math.inf),
            "logprobs": (0, 1000), "most_empty": (0, 1),
        }  # fmt: skip
        whole = ("concurrency", "retries", "max_tokens", "logprobs", "seed")
        optional = ("requests_per_minute", "temperature", "top_p", "price_input", "price_output", "logprobs", "seed")
        for name in {**bounds, "seed": ()}:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            kind = int if name in whole else (int, float)
            low, high = bounds.get(name, (-(2**63), 2**63))
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or (value == math.inf):
                between = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
                raise UserError(f"{name}={value!r}", f"give a{' whole' if kind is int else ''} number {between}")

    def api_key(self) -> str:
        """The key from the environment, "" when the variable is not set.

        Raises:
            UserError: the variable holds what cannot be sent as a key; its value is not shown.
        """
        key = os.environ.get(self.key_env, "").strip()
        keep_secret(key)
        if not (key.isascii() and key.isprintable()):
            what = f"the environment variable {self.key_env} holds characters that no key has"
            raise UserError(what, "set it again, without line breaks")
        return key

    def hide(self, text: str) -> str:
        """`text` with the key and the credentials blotted out."""
        secrets = [os.environ.get(self.key_env, "").strip()]
        if self.credentials:
            secrets += [self.credentials.basic(), self.credentials.password or self.credentials.user]
        for secret in secrets:
            text = text.replace(secret, HIDDEN) if secret else text
        return text

    def messages(self, prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages of a chat: those given, or the system message and the text as the user's."""
        if not isinstance(prompt, str):
            return prompt
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": prompt}]

    def body(self, request: Request) -> dict[str, Any]:
        """The fields that are sent."""
        said: dict[str, Any] = {"model": self.model, self.token_limit_name if self.chat else "max_tokens": self.max_tokens}
        said["messages" if self.chat else "prompt"] = self.messages(request.prompt) if self.chat else request.prompt
        for name in ("temperature", "top_p", "seed"):
            if getattr(self, name) is not None:
                said[name] = getattr(self, name)
        if self.stop:
            said["stop"] = self.stop if isinstance(self.stop, str) else list(self.stop)
        if self.logprobs is not None:
            said |= {"logprobs": True, "top_logprobs": self.logprobs} if self.chat else {"logprobs": self.logprobs}
        return said

    def key(self, request: Request) -> str:
        """Digest (16 hex digits) of everything that decides the answer: address, model, sampling, prompt; not pace, price or secrets."""
        decides = {"base_url": self.base_url, "chat": self.chat, "max_tokens": self.max_tokens, **self.body(request)}
        decides.pop("max_completion_tokens", None)
        return fingerprint(decides)


@dataclass(frozen=True)
class Request:
    """One question.

    Args:
        id: the caller's name for it; it does not decide the answer.
        prompt: text, or for a chat a list of messages `{"role": ..., "content": ...}`, sent as they are.
    """

    id: str
    prompt: str | list[dict[str, Any]] = field(repr=False)


def check_requests(settings: EndpointSettings, requests: list[Request]) -> None:
    """Whether every prompt can be sent.

    Raises:
        UserError: an id twice, a prompt that is no text and no list of messages, or messages without chat.
    """
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise UserError(f"two requests have the id {request.id!r}", "give every request an id of its own")
        seen.add(request.id)
        prompt = request.prompt
        if not isinstance(prompt, str):
            if not settings.chat:
                raise UserError(f"request {request.id!r}: messages need chat=True", "give the prompt as one text, or set chat=True")
            whole = isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
            if not whole or not prompt:
                hint = 'give text, or a list of {"role": "user", "content": "..."}'
                raise UserError(f"request {request.id!r}: the prompt is neither text nor a list of messages", hint)
        try:
            _all_text(prompt).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"request {request.id!r}: the prompt holds half a character (a lone surrogate)", "mend the text") from None


def _all_text(prompt: str | list[dict[str, Any]]) -> str:
    """The text of a prompt; parts that are not text (pictures) are left out."""
    if isinstance(prompt, str):
        return prompt
    parts: list[str] = []
    for message in prompt:
        content = message.get("content")
        pieces = content if isinstance(content, list) else [content]
        parts += [piece if isinstance(piece, str) else str(piece.get("text", "")) if isinstance(piece, dict) else "" for piece in pieces]
    return "\n".join(parts)


_PER_MESSAGE = 4  # tokens that chat templates put around a message, roughly
_BYTES_PER_TOKEN = 3  # English has about 4 bytes a token, Chinese about 3; the smaller number keeps the estimate on the safe side


def count_tokens(settings: EndpointSettings, request: Request, tokenizer: Any = None) -> int:
    """Tokens of a prompt: with `tokenizer.encode`, or else UTF-8 bytes / 3; 4 more for each message of a chat."""
    messages = settings.messages(request.prompt) if settings.chat else request.prompt
    text = _all_text(messages)
    size = math.ceil(len(text.encode("utf-8")) / _BYTES_PER_TOKEN) if tokenizer is None else len(tokenizer.encode(text))
    return size + (_PER_MESSAGE * len(messages) if settings.chat else 0)


def money(settings: EndpointSettings, prompt_tokens: int, completion_tokens: int) -> float | None:
    """What so many tokens cost, or None when a price is unknown."""
    if settings.price_input is None or settings.price_output is None:
        return None
    return (prompt_tokens * settings.price_input + completion_tokens * settings.price_output) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What a call of `Endpoint.ask` would do.

    Args:
        requests: number of requests.
        already_answered: those of them whose answer is in the log.
        to_ask: different questions that would be sent.
        prompt_tokens: tokens of the prompts to send (see `count_tokens`).
        most_completion_tokens: tokens of their answers if each is as long as allowed.
        cost: money for both, an upper bound as far as the prompt tokens are right; None when a price is unknown.
        seconds: from the limit of requests a minute and from the middle duration of answers in the log; None when neither is known.
    """

    requests: int
    already_answered: int
    to_ask: int
    prompt_tokens: int
    most_completion_tokens: int
    cost: float | None
    seconds: float | None
