"""Requests to an OpenAI-compatible server: each with a deadline and bounded retries, none of them fatal."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx2

from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.rewards.gsrm.chat_model import Reply
from distillkit.rewards.gsrm.decomposer import Undecided

__all__ = ["ChatClient", "server_address"]

_LOG = logging.getLogger(__name__)
_LONGEST_PAUSE_S = 60.0
_LARGEST_REPLY = 2**26
_JSON = {"Content-Type": "application/json"}
_AGAIN = frozenset({408, 409, 425, 429})
"""Client errors that another try may not meet; so may every 5xx."""

Messages = Sequence[Mapping[str, str]]


class _Failure(Exception):
    """One try failed. `again`: another may not; `down`: nobody listens at that address."""

    def __init__(
        self, reason: str, detail: str = "", *, again: bool, down: bool = False, pause: float | None = None
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.again, self.down, self.pause = reason, detail, again, down, pause


class ChatClient:
    """Asks `POST {base_url}/chat/completions`, many conversations at a time.

    A connection that is refused, an answer that does not come in time or is no answer (not JSON, no text in it), and
    the statuses 408, 409, 425, 429 and 5xx are tried again after a pause of `backoff_s`, doubled every time (or what
    `Retry-After` says, at most a minute). Redirects and other 4xx are not. Once nobody listens, what is not yet asked
    in the same call is not tried.

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

    def ask(
        self, conversations: Sequence[Messages], *, max_tokens: int, body: Mapping[str, Any] | None = None
    ) -> list[Reply | Undecided]:
        """Return the server's reply to each conversation, at temperature 0, in order.

        Args:
            conversations: chat messages.
            max_tokens: of a reply.
            body: further entries of these requests.
        """
        if self._http is None:
            raise ScoringError(problem(f"{self._where}: called before setup", hint="call setup first"))
        if not conversations:
            return []
        http, down = self._http, threading.Event()

        def one(messages: Messages) -> Reply | Undecided:
            entries = {
                "model": self.model,
                "messages": [dict(message) for message in messages],
                "temperature": 0.0,
                "max_tokens": max_tokens,
                **(body or {}),
                **self.extra_body,
            }
            return self._tried(http, {k: v for k, v in entries.items() if v is not None}, down)

        with ThreadPoolExecutor(min(self._concurrency, len(conversations)), thread_name_prefix="gsrm") as threads:
            return list(threads.map(one, conversations))

    def _tried(self, http: httpx2.Client, entries: Mapping[str, Any], down: threading.Event) -> Reply | Undecided:
        for attempt in range(self._retries + 1):
            if down.is_set():
                return Undecided(reason="not asked, since the server is down", lasting=False)
            try:
                return self._answer(http, entries)
            except _Failure as failure:
                if not failure.again or attempt == self._retries:
                    if failure.down:
                        down.set()
                    return self._given_up(failure, attempt + 1)
                pause = self._backoff * 2**attempt if failure.pause is None else failure.pause
                time.sleep(min(pause, _LONGEST_PAUSE_S))
        raise AssertionError("unreachable")

    def _given_up(self, failure: _Failure, tries: int) -> Undecided:
        detail = failure.detail if self._key is None else failure.detail.replace(self._key, "***")
        given_up = Undecided(reason=failure.reason, detail=detail, lasting=False)
        if failure.reason not in self._told:
            self._told.add(failure.reason)
            text = "%s: %s (%d %s); not scored, and counted. Said once for each kind of failure"
            _LOG.warning(text, self.url, given_up, tries, "try" if tries == 1 else "tries")
        return given_up

    def _answer(self, http: httpx2.Client, entries: Mapping[str, Any]) -> Reply:
        deadline = time.monotonic() + self._timeout
        try:
            # ASCII: a lone surrogate of a data file has no UTF-8 form.
            payload = json.dumps(entries).encode("ascii")
            with http.stream("POST", self.url, content=payload, headers=_JSON) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:  # the client's own timeout starts anew with every byte
                        raise _Failure(f"no whole answer within {self._timeout:g} s", again=True)
                    if len(content) > _LARGEST_REPLY:
                        raise _Failure(f"an answer of more than {_LARGEST_REPLY} bytes", again=False)
        except httpx2.TimeoutException as error:
            raise _Failure(f"no answer within {self._timeout:g} s", type(error).__name__, again=True) from error
        except httpx2.ConnectError as error:
            raise _Failure("cannot connect", _short(str(error)), again=True, down=True) from error
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            raise _Failure("broken connection", _short(f"{type(error).__name__}: {error}"), again=True) from error
        if response.status_code != 200:
            status, text = response.status_code, _short(bytes(content).decode(errors="replace"))
            again = status >= 500 or status in _AGAIN
            pause = _seconds(response.headers.get("retry-after"))
            raise _Failure(f"HTTP {status}", text, again=again, pause=pause)
        return _read(bytes(content))


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


def _read(content: bytes) -> Reply:
    """Return the reply in a chat completion."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        shown = _short(content.decode(errors="replace"))
        raise _Failure("an answer that is not JSON", shown, again=True) from error
    try:
        choice = answer["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        shown = _short(json.dumps(answer))
        raise _Failure("an answer without choices[0].message.content", shown, again=True) from error
    if not isinstance(text, str):
        raise _Failure("an answer without text", f"content is {json.dumps(text):.80}", again=True)
    return Reply(text=text.encode(errors="replace").decode(), finished=ended != "length")


def _seconds(header: str | None) -> float | None:
    """A `Retry-After` in seconds; a date, or what is no number, counts as none."""
    try:
        value = float(header) if header is not None else None
    except ValueError:
        return None
    return value if value is not None and 0 <= value < float("inf") else None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}…"
