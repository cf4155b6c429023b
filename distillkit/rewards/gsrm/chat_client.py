"""Requests to an OpenAI-compatible server: each with a deadline and bounded retries, none of them fatal."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx2

from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.rewards.gsrm.chat_model import Reply
from distillkit.rewards.gsrm.chat_request import Failure, read_reply_text, send
from distillkit.rewards.gsrm.decomposer import Undecided
from distillkit.rewards.gsrm.outage import Outage

__all__ = ["NOT_ASKED", "ChatClient", "server_address"]

NOT_ASKED = "not asked, since the server failed"
"""The reason of what a call did not ask any more; its detail is the failure."""

_LOG = logging.getLogger(__name__)
_LONGEST_PAUSE_S = 60.0
_PROBE = ({"role": "user", "content": "Say yes."},)
_KEY = "api_key_env", "a key that the server takes", "name the environment variable that holds the right one"
_SETTINGS: dict[int | None, tuple[str, str, str]] = {
    401: _KEY,
    403: _KEY,
    404: ("model", "a name and a path that the server knows", "the name it serves, or another path in base_url"),
    None: ("base_url", "a server that listens", "start it first, or another address"),
}
"""By status: which argument is wrong, what it should be, what to do."""

Messages = Sequence[Mapping[str, str]]


class ChatClient:
    """Asks `POST {base_url}/chat/completions`, many conversations at a time.

    A connection that is refused, an answer that does not come in time or is no answer (not JSON, no text in it), and
    the statuses 408, 409, 425, 429 and 5xx are tried again after a pause of `backoff_s`, doubled every time (or what
    `Retry-After` says, at most a minute). Redirects and other 4xx are not.

    A server that fails altogether (see `Outage`) is not asked further in the same call: what was answered until then is
    kept, the rest is `Undecided`. The next call first sends one tiny request, and the others only when that is
    answered.

    The key is read from the environment when the client opens, sent in the `Authorization` header, and appears in no
    error, log or cache key.

    Args:
        base_url: such as `http://localhost:8000/v1`; `/v1` is added to an address without a path.
        model: name of the model on the server.
        api_key_env: environment variable with the key; None sends none.
        timeout_s: seconds for one answer.
        retries: further tries after a failed one.
        backoff_s: seconds before the first of them.
        concurrency: requests at a time.
        extra_body: merged into every request; null takes an entry out.
        where: whose arguments these are, for error texts.

    Raises:
        ConfigError: an argument out of range, an address that is none, or (in `open`) no usable key.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        concurrency: int,
        extra_body: Mapping[str, Any] | None,
        where: str,
    ) -> None:
        for name, value, ok, wanted in (
            ("timeout_s", timeout_s, timeout_s > 0, "more than 0 seconds"),
            ("retries", retries, retries >= 0, "at least 0"),
            ("backoff_s", backoff_s, backoff_s >= 0, "at least 0 seconds"),
            ("concurrency", concurrency, concurrency >= 1, "at least 1"),
            ("model", model, bool(model), "the name of a model on the server"),
        ):
            if not ok:
                raise ConfigError(problem(f"{where}.{name}", got=repr(value), expected=wanted))
        self.url = f"{server_address(base_url, where)}/chat/completions"
        self.model = model
        self.extra_body = dict(extra_body or {})
        self._where, self._key_variable = where, api_key_env
        self._timeout, self._retries, self._backoff = timeout_s, retries, backoff_s
        self._concurrency = concurrency
        self._key: str | None = None
        self._http: httpx2.Client | None = None
        self._cause: Failure | None = None
        """Why the last call ended early; None where it did not."""
        self._told: set[str] = set()

    def open(self) -> None:
        """Read the key and make the connection pool; sends nothing yet."""
        self._key = None if self._key_variable is None else _key(self._key_variable, f"{self._where}.api_key_env")
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limits = httpx2.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        self._http = httpx2.Client(headers=headers, timeout=self._timeout, limits=limits, follow_redirects=False)

    def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            self._http.close()
        self._http = None

    def probe(self) -> None:
        """Send one tiny request, to learn of wrong settings before the first call that matters.

        A server that is slow or busy is only warned of: it may not be, later.

        Raises:
            ConfigError: nobody listens at the address, or the key, the model or the path is refused.
        """
        failure = self._sign_of_life(self._opened())
        if failure is None:
            return
        shown = f"{self.url}: {self._undecided(failure)}"
        if failure.fault in ("unreachable", "refused"):
            argument, expected, hint = _SETTINGS[failure.status]
            where = f"{self._where}.{argument}: the server cannot be used"
            raise ConfigError(problem(where, got=shown, expected=expected, hint=hint))
        self._cause = failure if failure.fault == "late" else None
        _LOG.warning("%s: a first request failed, %s; the run goes on", self._where, shown)

    def ask(
        self, conversations: Sequence[Messages], *, max_tokens: int, body: Mapping[str, Any] | None = None
    ) -> list[Reply | Undecided]:
        """Return the server's reply to each conversation, at temperature 0, in order.

        A round is about `timeout_s` and a pause, of at most a minute. A server that answers now and then costs a call
        at most ⌈conversations / concurrency⌉ · (retries + 1) rounds. One that answers nothing costs it at most
        2 · (retries + 1): two rounds, where `concurrency` is no smaller than that and there are as many conversations.
        The next call then costs one `timeout_s`, until the server answers again.

        Args:
            conversations: chat messages.
            max_tokens: of a reply.
            body: further entries of these requests.
        """
        http = self._opened()
        if not conversations:
            return []
        if self._cause is not None:
            self._cause = self._sign_of_life(http)
        if self._cause is not None and not _serves(self._cause):
            self._tell(self._cause, 1)
            return [self._undecided(self._cause, asked=False)] * len(conversations)
        outage = Outage(conversations=len(conversations), concurrency=self._concurrency, tries=self._retries + 1)

        def one(messages: Messages) -> Reply | Undecided:
            return self._tried(http, self._entries(messages, max_tokens, body or {}), outage)

        with ThreadPoolExecutor(min(self._concurrency, len(conversations)), thread_name_prefix="gsrm") as threads:
            results = list(threads.map(one, conversations))
        self._cause = outage.cause
        return results

    def _opened(self) -> httpx2.Client:
        if self._http is None:
            raise ScoringError(problem(f"{self._where}: called before setup", hint="call setup first"))
        return self._http

    def _entries(self, messages: Messages, max_tokens: int, body: Mapping[str, Any]) -> dict[str, Any]:
        entries = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": 0.0,
            "max_tokens": max_tokens,
            **body,
            **self.extra_body,
        }
        return {k: v for k, v in entries.items() if v is not None}

    def _sign_of_life(self, http: httpx2.Client) -> Failure | None:
        """Return why one tiny request failed; None when it did not."""
        try:
            send(http, self.url, self._entries(_PROBE, 1, {}), timeout_s=self._timeout)
        except Failure as failure:
            return failure
        return None

    def _tried(self, http: httpx2.Client, entries: Mapping[str, Any], outage: Outage) -> Reply | Undecided:
        if outage.cause is not None:
            return self._undecided(outage.cause, asked=False)
        for attempt in range(self._retries + 1):
            try:
                reply = read_reply_text(send(http, self.url, entries, timeout_s=self._timeout))
            except Failure as failure:
                last = not failure.again or attempt == self._retries
                outage.failed(failure, last=last)
                if not last and outage.cause is None:
                    pause = self._backoff * 2**attempt if failure.pause is None else failure.pause
                    time.sleep(min(pause, _LONGEST_PAUSE_S))
                if last or outage.cause is not None:
                    self._tell(failure, attempt + 1)
                    return self._undecided(failure)
            else:
                outage.answered()
                return reply
        raise AssertionError("unreachable")

    def _undecided(self, failure: Failure, *, asked: bool = True) -> Undecided:
        detail = failure.detail if self._key is None else failure.detail.replace(self._key, "***")
        given_up = Undecided(reason=failure.reason, detail=detail, lasting=False, status=failure.status)
        return given_up if asked else replace(given_up, reason=NOT_ASKED, detail=str(given_up))

    def _tell(self, failure: Failure, tries: int) -> None:
        if failure.reason not in self._told:
            self._told.add(failure.reason)
            text = "%s: %s (%d %s); not scored, and counted. Said once for each kind of failure"
            _LOG.warning(text, self.url, self._undecided(failure), tries, "try" if tries == 1 else "tries")


def server_address(base_url: str, where: str) -> str:
    """Return an address without its last slash, with `/v1` where it has no path.

    Raises:
        ConfigError: it is no http address, or has credentials in it (which would end up in logs).

    Example:
        >>> server_address("http://localhost:8000", "x"), server_address("https://host/openai/v1/", "x")
        ('http://localhost:8000/v1', 'https://host/openai/v1')
    """
    try:
        parts = urlsplit(base_url)
        has_credentials, named = "@" in parts.netloc, bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, has_credentials, named = urlsplit(""), "@" in base_url, False
    if has_credentials:
        hint = "the name of an environment variable with the key, in api_key_env"
        raise ConfigError(problem(f"{where}.base_url: credentials in the address", expected="none", hint=hint))
    if parts.scheme not in ("http", "https") or not named or parts.query or parts.fragment:
        raise ConfigError(
            problem(f"{where}.base_url: no address", got=repr(base_url), expected="such as http://localhost:8000/v1")
        )
    return base_url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _key(variable: str, where: str) -> str:
    """Return the key in an environment variable; error texts name the variable, never its value."""
    value = os.environ.get(variable, "").strip()
    if not value:
        hint = f"export {variable}=…, or null for a server without keys"
        raise ConfigError(problem(f"{where}: the environment variable {variable} is not set", hint=hint))
    if not value.isascii() or not value.isprintable() or " " in value:
        what = f"{where}: the environment variable {variable} holds no key"
        raise ConfigError(problem(what, got="spaces or characters that a header cannot carry", expected="one word"))
    return value


def _serves(failure: Failure) -> bool:
    """Whether who fails like this may answer other requests: it has answered, without an error of its own."""
    return failure.fault == "request" and failure.status is not None and failure.status < 500
