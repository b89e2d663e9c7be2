"""What can go wrong with a request: whether it is worth a repeat, whether it ends the job, and one clear line about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from limbeck.endpoint.answers import Malformed
from limbeck.endpoint.pace import retry_after
from limbeck.endpoint.settings import EndpointSettings
from limbeck.errors import UserError

TOO_LONG = 600.0
"""Seconds: a server that asks for a longer wait ends the job."""


@dataclass(frozen=True)
class Failure:
    """Why a request was not answered.

    Args:
        kind: "connection", "timeout", "busy", "status", "malformed", "missing" (404), "denied" (401, 403), "refused" (another 4xx).
        message, hint: for the user, without secrets.
        again: whether a repeat may help.
        ends: whether nothing else can be answered either.
        wait: seconds that the server asked for.
    """

    kind: str
    message: str
    hint: str
    again: bool
    ends: bool = False
    wait: float | None = None

    def error(self) -> UserError:
        """As an error for the user."""
        return UserError(self.message, self.hint)


def _said(settings: EndpointSettings, response: Any) -> tuple[str, str]:
    """The server's own message and error code, cut and without secrets."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return "", ""
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    code = ""
    if isinstance(error, dict):
        code = str(error.get("code") or error.get("type") or "")
        error = error.get("message", error.get("detail", ""))
    text = " ".join(str(error).split())
    return settings.hide(text)[:300], code


def _of_status(settings: EndpointSettings, response: Any) -> Failure:
    status, url = response.status_code, settings.base_url
    said, code = _said(settings, response)
    quoted = f": {said}" if said else ""
    if status in (401, 403):
        if settings.credentials:
            hint = "check user and password in base_url"
        elif settings.api_key():
            hint = f"check the key in the environment variable {settings.key_env}"
        else:
            hint = f"set the environment variable {settings.key_env} to your key; it is not set"
        what = "does not accept the key" if status == 401 else "does not allow this"
        return Failure("denied", f"{url} {what} (HTTP {status})", hint, again=False, ends=True)
    if status == 404:
        hint = "check base_url (it usually ends in /v1) and model"
        return Failure("missing", f"{url} answers HTTP 404{quoted}", hint, again=False, ends=True)
    if status == 429:
        wait = retry_after(response.headers)
        if "insufficient_quota" in (code, said):
            return Failure("busy", f"{url}: the account has nothing left{quoted}", "add credit, then run again", again=False, ends=True)
        if wait is not None and wait > TOO_LONG:
            message = f"{url} asks to wait {wait:.0f} seconds (HTTP 429){quoted}"
            return Failure("busy", message, "run again later; what was answered is kept", again=False, ends=True)
        hint = "lower requests_per_minute or concurrency, or raise retries"
        message = f"{url} still answers HTTP 429 (too many requests) after all retries{quoted}"
        return Failure("busy", message, hint, again=True, ends=True, wait=wait)
    if status in (408, 409, 425) or status >= 500:
        wait = retry_after(response.headers)
        wait = None if wait is not None and wait > TOO_LONG else wait
        return Failure("status", f"{url} answers HTTP {status}{quoted}", "look into the server's log", again=True, wait=wait)
    hint = "see what the server says; a prompt may be too long, or a setting unknown to this model"
    if "max_completion_tokens" in said:
        hint = 'set token_limit_name="max_completion_tokens"'
    return Failure("refused", f"{url} refuses a request (HTTP {status}){quoted}", hint, again=False)


def failure_of(settings: EndpointSettings, error: Exception) -> Failure:
    """What an exception of the client, or `Malformed`, means. Exceptions of another kind are raised again."""
    import openai

    url = settings.base_url
    if isinstance(error, Malformed):
        hint = "check that base_url is an OpenAI-compatible API (it usually ends in /v1)"
        return Failure("malformed", f"{url}: {settings.hide(str(error))}", hint, again=True)
    if isinstance(error, openai.APITimeoutError):
        hint = "raise timeout, lower concurrency or max_tokens, or look whether the server is overloaded"
        return Failure("timeout", f"{url} did not answer within {settings.timeout:g} seconds", hint, again=True)
    if isinstance(error, openai.APIStatusError):
        return _of_status(settings, error.response)
    if isinstance(error, openai.APIConnectionError):
        cause = settings.hide(" ".join(str(error.__cause__ or error).split()))[:200]
        hint = "check that the server runs and that base_url is right"
        return Failure("connection", f"no connection to {url}: {cause}", hint, again=True)
    raise error
