"""One HTTP request to a vLLM server: its answer, or why there is none."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from distillkit.errors import ConfigError, problem

__all__ = ["Failure", "Fault", "send", "server_address"]

Fault = Literal["gone", "busy", "broken", "request"]
"""Whose fault a failure is. `gone`: nobody listens, and so nothing was tried. `broken`: the server did not answer in
time, broke off, or had an error of its own (5xx). `busy`: it asks to come again later. `request`: it refuses this
request, and would again."""

_BUSY = frozenset({408, 425, 429})
_LARGEST_ANSWER = 2**30
_JSON = {"Content-Type": "application/json"}


class Failure(Exception):
    """One request failed.

    Args:
        reason: what happened.
        fault: see `Fault`.
        pause: seconds that the server asks for before another try.
    """

    def __init__(self, reason: str, *, fault: Fault, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fault: Fault = fault
        self.pause = pause


def send(http: httpx2.Client, url: str, entries: Mapping[str, Any] | None = None, *, timeout_s: float) -> Any:
    """Post `entries` as JSON, or get `url` where there are none; return the JSON of a successful answer.

    Raises:
        Failure: there was none within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    late = f"no whole answer within {timeout_s:g} s"
    payload = None if entries is None else json.dumps(entries).encode()
    try:
        with http.stream(
            "GET" if payload is None else "POST", url, content=payload, headers=_JSON, timeout=timeout_s
        ) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > deadline:  # the client's own time-out starts anew with every byte
                    raise Failure(late, fault="broken")
                if len(content) > _LARGEST_ANSWER:
                    raise Failure(f"an answer of more than {_LARGEST_ANSWER} bytes", fault="request")
    except httpx2.ConnectTimeout as error:
        raise Failure(f"no connection within {timeout_s:g} s", fault="gone") from error
    except httpx2.TimeoutException as error:
        raise Failure(late, fault="broken") from error
    except httpx2.ConnectError as error:
        raise Failure(f"cannot connect ({_short(str(error))})", fault="gone") from error
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError) as error:
        raise Failure(f"broken connection ({_short(f'{type(error).__name__}: {error}')})", fault="broken") from error
    status = response.status_code
    if status != 200:
        fault: Fault = "broken" if status >= 500 else "busy" if status in _BUSY else "request"
        pause = _seconds(response.headers.get("retry-after"))
        raise Failure(f"HTTP {status} {_message(bytes(content))}".rstrip(), fault=fault, pause=pause)
    try:
        return json.loads(content) if content else None
    except (ValueError, RecursionError) as error:
        shown = _short(content[:400].decode(errors="replace"))
        raise Failure(f"an answer that is not JSON: {shown}", fault="broken") from error


def server_address(url: str, where: str) -> str:
    """Return an address without its last slash and without `/v1`.

    Raises:
        ConfigError: it is no http address, or has credentials in it (which would end up in logs).

    Example:
        >>> server_address("http://localhost:8000/v1/", "x"), server_address("https://host/teacher", "x")
        ('http://localhost:8000', 'https://host/teacher')
    """
    try:
        parts = urlsplit(url)
        has_credentials, named = "@" in parts.netloc, bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, has_credentials, named = urlsplit(""), "@" in url, False
    if has_credentials:
        hint = "the name of an environment variable with the key, in api_key_env"
        raise ConfigError(problem(f"{where}: credentials in the address", expected="none", hint=hint))
    if parts.scheme not in ("http", "https") or not named or parts.query or parts.fragment:
        raise ConfigError(problem(f"{where}: no address", got=repr(url), expected="such as http://localhost:8000"))
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _message(content: bytes) -> str:
    """What an OpenAI-style error says, else the beginning of the answer."""
    try:
        return _short(str(json.loads(content)["error"]["message"]))
    except (ValueError, RecursionError, KeyError, TypeError):
        return _short(content[:400].decode(errors="replace"))


def _seconds(header: str | None) -> float:
    """A `Retry-After` in seconds, at most a minute; a date, or what is no number, counts as none."""
    try:
        value = float(header or 0.0)
    except ValueError:
        return 0.0
    return min(value, 60.0) if value > 0 else 0.0


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"
