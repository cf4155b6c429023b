"""One request to an OpenAI-compatible server: its answer, or why there is none."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Literal

import httpx2

from distillkit.rewards.gsrm.chat_model import Reply

__all__ = ["REFUSED", "Failure", "read_reply_text", "send"]

REFUSED = frozenset({401, 403, 404})
"""Statuses of a wrong key, model or path."""

_AGAIN = frozenset({408, 409, 425, 429})
"""Client errors that another try may not meet; so may every 5xx."""
_LARGEST_REPLY = 2**26
_JSON = {"Content-Type": "application/json"}

Fault = Literal["request", "late", "unreachable", "refused"]


class Failure(Exception):
    """One try failed.

    Args:
        reason: what kind of failure.
        detail: what else is known.
        again: another try may not fail.
        fault: whose it is. `late`: the answer did not come in time; `unreachable`: nobody listens at that address;
            `refused`: the key, the model or the path is wrong; `request`: anything else.
        status: of the HTTP answer; None where none came whole.
        pause: seconds that the server asks for before another try.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        again: bool,
        fault: Fault = "request",
        status: int | None = None,
        pause: float | None = None,
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
        self.again, self.fault, self.status, self.pause = again, fault, status, pause


def send(http: httpx2.Client, url: str, entries: Mapping[str, Any], *, timeout_s: float) -> bytes:
    """Post JSON and return the content of a successful answer.

    Raises:
        Failure: there was none.
    """
    deadline = time.monotonic() + timeout_s
    late = f"answer within {timeout_s:g} s"
    try:
        # ASCII: a lone surrogate of a data file has no UTF-8 form.
        payload = json.dumps(entries).encode("ascii")
        with http.stream("POST", url, content=payload, headers=_JSON) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > deadline:  # the client's own timeout starts anew with every byte
                    raise Failure(f"no whole {late}", again=True, fault="late")
                if len(content) > _LARGEST_REPLY:
                    raise Failure(f"an answer of more than {_LARGEST_REPLY} bytes", again=False)
    except httpx2.TimeoutException as error:
        raise Failure(f"no {late}", type(error).__name__, again=True, fault="late") from error
    except httpx2.ConnectError as error:
        raise Failure("cannot connect", _short(str(error)), again=True, fault="unreachable") from error
    except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
        raise Failure("broken connection", _short(f"{type(error).__name__}: {error}"), again=True) from error
    if response.status_code != 200:
        status = response.status_code
        raise Failure(
            f"HTTP {status}",
            _short(bytes(content).decode(errors="replace")),
            again=status >= 500 or status in _AGAIN,
            fault="refused" if status in REFUSED else "request",
            status=status,
            pause=_seconds(response.headers.get("retry-after")),
        )
    return bytes(content)


def read_reply_text(content: bytes) -> Reply:
    """Return the reply in a chat completion.

    Raises:
        Failure: it is none.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        shown = _short(content.decode(errors="replace"))
        raise Failure("an answer that is not JSON", shown, again=True, status=200) from error
    try:
        choice = answer["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        shown = _short(json.dumps(answer))
        raise Failure("an answer without choices[0].message.content", shown, again=True, status=200) from error
    if not isinstance(text, str):
        raise Failure("an answer without text", f"content is {json.dumps(text):.80}", again=True, status=200)
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
