"""Requests to a vLLM server: bounded in number and in time, tried again where that can help."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx2

__all__ = ["Refused", "ServerClient", "Unreachable"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_CONNECT_S = 10.0


class Unreachable(Exception):
    """No answer from the server, or one of its own failures (5xx), for as long as it was tried again."""


class Refused(Exception):
    """The server answered that it will not do this (4xx), or a control call failed; the text is the server's."""


_Answers = queue.Queue[tuple[int, Any] | BaseException]
_UNWANTED = Refused("sampling was ended")


class ServerClient:
    """A server by its address.

    Args:
        url: such as `http://127.0.0.1:8000`.
        concurrency: requests under way at once.
        timeout_s: longest wait for one answer.
        retry_s: how long a request is tried again, with growing pauses, after a broken connection or a 5xx.
        ended: says why the server will not come back, or None while it may.
    """

    def __init__(
        self, url: str, *, concurrency: int, timeout_s: float, retry_s: float, ended: Callable[[], str | None]
    ) -> None:
        self.url = url.rstrip("/")
        self._concurrency = concurrency
        self._retry_s = retry_s
        self._ended = ended
        self._timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_S)
        self._waiting: set[_Answers] = set()
        self._unwanted = False

    def healthy(self) -> bool:
        """Whether the server says so now."""
        try:
            return httpx2.get(f"{self.url}/health", timeout=_CONNECT_S).status_code == 200
        except httpx2.HTTPError:
            return False

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            Refused, Unreachable: there is none.
        """
        patience = _Patience(self._retry_s, self._ended)
        while True:
            try:
                return _content(httpx2.get(f"{self.url}{path}", timeout=self._timeout))
            except (httpx2.HTTPError, _ServerFailure, ValueError) as error:
                time.sleep(patience.pause(error))

    def post(self, path: str, entries: Mapping[str, Any] | None = None) -> Any:
        """Post once and return the JSON of the answer: a control call is never repeated on its own.

        Raises:
            Refused, Unreachable: it failed.
        """
        try:
            return _content(httpx2.post(f"{self.url}{path}", json=entries, timeout=self._timeout))
        except _ServerFailure as error:
            raise Refused(str(error)) from error
        except (httpx2.HTTPError, ValueError) as error:
            raise Unreachable(_said(error)) from error

    def each(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Any]]:
        """Post every body and yield its place and the answer's JSON, each as soon as it is there.

        A consumer that stops early, or an error, breaks off the requests under way; the server then aborts them.

        Raises:
            Refused, Unreachable: one failed.
        """
        answers: _Answers = queue.Queue()
        self._waiting.add(answers)
        if self._unwanted:
            answers.put(_UNWANTED)
        worker = _Worker(lambda: self._all(path, bodies, answers.put), answers.put)
        try:
            for _ in bodies:
                answer = answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            self._waiting.discard(answers)
            worker.stop()

    def break_off(self) -> None:
        """Let `each` raise `Refused` in every thread that runs it, now and from now on."""
        self._unwanted = True
        for answers in tuple(self._waiting):
            answers.put(_UNWANTED)

    async def _all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], done: Callable[[tuple[int, Any]], None]
    ) -> None:
        limits = httpx2.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        free = asyncio.Semaphore(self._concurrency)
        async with httpx2.AsyncClient(timeout=self._timeout, limits=limits) as http, asyncio.TaskGroup() as group:

            async def one(place: int, body: Mapping[str, Any]) -> None:
                async with free:
                    done((place, await self._post(http, path, body)))

            for place, body in enumerate(bodies):
                group.create_task(one(place, body))

    async def _post(self, http: httpx2.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
        patience = _Patience(self._retry_s, self._ended)
        while True:
            try:
                return _content(await http.post(f"{self.url}{path}", json=body))
            except (httpx2.HTTPError, _ServerFailure, ValueError) as error:
                await asyncio.sleep(patience.pause(error))


class _ServerFailure(Exception):
    """A 5xx, with the server's text."""


class _Patience:
    """How long one request is tried again: pauses of 0.2 s, 0.4 s … 5 s, `retry_s` after its first failure at most."""

    def __init__(self, retry_s: float, ended: Callable[[], str | None]) -> None:
        self._retry_s = retry_s
        self._ended = ended
        self._first: float | None = None
        self._next = _FIRST_PAUSE

    def pause(self, error: Exception) -> float:
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        if (reason := self._ended()) is not None:
            raise Unreachable(reason) from error
        if now - self._first >= self._retry_s:
            raise Unreachable(f"{_said(error)}; tried again for {now - self._first:.0f} s") from error
        pause, self._next = self._next, min(2 * self._next, _LONGEST_PAUSE)
        return min(pause, self._retry_s)


class _Worker:
    """One thread with an event loop of its own, which can be stopped from outside."""

    def __init__(self, work: Callable[[], Any], failed: Callable[[BaseException], None]) -> None:
        self._work, self._failed = work, failed
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vllm requests", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._work())
        self._started.set()
        try:
            self._loop.run_until_complete(self._task)
        except BaseExceptionGroup as group:
            self._failed(group.exceptions[0])
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._failed(error)
        finally:
            self._loop.close()

    def stop(self) -> None:
        self._started.wait()
        assert self._task is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()


def _content(response: httpx2.Response) -> Any:
    if response.status_code < 300:
        return response.json() if response.content else None
    try:
        error = response.json()["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = response.text
    text = f"HTTP {response.status_code}: {' '.join(text.split())[:600]}"
    if response.status_code >= 500 or response.status_code == 429:
        raise _ServerFailure(text)
    raise Refused(text)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
