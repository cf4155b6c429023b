"""Requests shared over several servers: by load, with retries, around servers that fail until they are back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import httpx2

from distillkit.errors import ScoringError, problem
from distillkit.teachers.vllm_request import Failure, send

__all__ = ["Server", "ServerPool"]

_LOG = logging.getLogger(__name__)
_LONGEST_PAUSE_S = 15.0
_HEALTH_TIMEOUT_S = 5.0
_LOOK_UP_S = 0.5
"""How often a request that waits looks whether it is still wanted."""

Answer = TypeVar("Answer")
State = Literal["up", "resting", "down"]
"""`resting`: it asked for time; `down`: it failed, so it is asked for its health before anything else."""


@dataclass(eq=False)
class Server:
    """One server as this process sees it; edited under the pool's lock only."""

    url: str
    where: str
    model: str | None = None
    max_model_len: int | None = None
    outstanding: int = 0
    state: State = "up"
    failures: int = 0
    again_at: float = 0.0
    checking: bool = False
    last: str = ""


class ServerPool:
    """Sends each request to the server with the fewest unanswered ones, `concurrency` at most; safe with many threads.

    A request that fails is sent again, to another server where there is one, up to `retries` times; that nobody
    listened is not counted. A server that failed is left alone for `backoff_s`, doubled each time in a row (15 s at
    most), and is then asked for `/health`, and by `recheck`, before anything else (not after 408, 425 and 429, which
    only ask for time). When all servers are down, requests wait `max_wait_s` for one to return.

    Args:
        servers: where to send.
        headers: of every request, credentials among them.
        concurrency: unanswered requests per server.
        timeout_s: seconds for one answer.
        retries: further tries of a request.
        backoff_s: seconds that a server rests after its first failure.
        max_wait_s: seconds to wait when no server answers.
        recheck: asks a server that was down and is back whether it is the same; raises `ScoringError` when it is not.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        headers: Mapping[str, str],
        concurrency: int,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        max_wait_s: float,
        recheck: Callable[[Server], None],
    ) -> None:
        self.servers = tuple(servers)
        self._concurrency, self._retries = concurrency, retries
        self._timeout, self._backoff, self._max_wait = timeout_s, backoff_s, max_wait_s
        self._recheck = recheck
        self._changed = threading.Condition()
        self._closed = False
        self._told = False
        self._turn = 0
        connections = concurrency * len(self.servers) + len(self.servers)
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx2.Client(headers=dict(headers), limits=limits, follow_redirects=False)

    def close(self) -> None:
        """End waiting requests and close the connections."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._http.close()

    def send(self, server: Server, path: str, entries: Mapping[str, Any] | None = None) -> Any:
        """Send one request to one server, once, in the name of its model.

        Raises:
            Failure: there was no answer.
        """
        if entries is not None and server.model is not None:
            entries = {"model": server.model, **entries}
        return send(self._http, f"{server.url}{path}", entries, timeout_s=self._timeout)

    def ask(
        self, path: str, entries: Mapping[str, Any], read: Callable[[Any], Answer], unwanted: threading.Event
    ) -> Answer:
        """Return what `read` makes of the answer of whichever server gives one.

        Args:
            path: such as `/v1/completions`.
            entries: JSON to post.
            read: may raise `Failure` for an answer that cannot be used.
            unwanted: set when the answer is no longer waited for.

        Raises:
            ScoringError: the request was refused, failed too often, or no server came back in time.
        """
        tries = 0
        while True:
            server = self._acquire(unwanted)
            try:
                answer = read(self.send(server, path, entries))
            except Failure as failure:
                self._failed(server, failure)
                tries += failure.fault != "gone"
                if failure.fault == "request" or tries > self._retries:
                    raise _given_up(server, failure, tries) from failure
            else:
                self._answered(server)
                return answer
            finally:
                self._release(server)

    def _acquire(self, unwanted: threading.Event) -> Server:
        """Return a server that takes one more request, counted as its; waits for one."""
        alone_since: float | None = None
        while True:
            with self._changed:
                if self._closed or unwanted.is_set():
                    raise ScoringError(problem("model.teacher: not scored", got="scoring was ended"))
                now = time.monotonic()
                for server in self.servers:
                    if server.state == "resting" and server.again_at <= now:
                        server.state = "up"
                up = [server for server in self.servers if server.state == "up"]
                free = [server for server in up if server.outstanding < self._concurrency]
                due = [s for s in self.servers if s.state == "down" and s.again_at <= now and not s.checking]
                if due:
                    due[0].checking = True
                elif free:
                    self._turn += 1
                    turn = self._turn % len(free)
                    best = min(free[turn:] + free[:turn], key=lambda server: server.outstanding)
                    best.outstanding += 1
                    return best
                else:
                    alone_since = None if up else alone_since or now
                    if alone_since is not None and all(server.state == "down" for server in self.servers):
                        self._tell_or_end(now - alone_since)
                    self._changed.wait(self._pause(now))
            if due:
                self._check_health(due[0])

    def _pause(self, now: float) -> float:
        returns = [server.again_at - now for server in self.servers if server.state != "up"]
        return min([_LOOK_UP_S, *(wait for wait in returns if wait > 0)])

    def _tell_or_end(self, waited: float) -> None:
        shown = "; ".join(f"{server.url}: {server.last}" for server in self.servers)
        if waited > self._max_wait:
            where = f"model.teacher.urls: no server answers, and none came back within {self._max_wait:g} s"
            hint = "start it again and continue with --ckpt_path last, or a larger model.teacher.max_wait_s"
            raise ScoringError(problem(where, got=shown, hint=hint))
        if not self._told:
            self._told = True
            text = "model.teacher: no server answers (%s); waiting up to %g s for one to return"
            _LOG.warning(text, shown, self._max_wait)

    def _check_health(self, server: Server) -> None:
        failure = Failure("it is another server now", fault="request")
        back = False
        try:
            send(self._http, f"{server.url}/health", timeout_s=min(self._timeout, _HEALTH_TIMEOUT_S))
            self._recheck(server)
            back = True
        except Failure as caught:
            failure = caught
        finally:
            with self._changed:
                server.checking = False
                if back:
                    server.state, self._told = "up", False
                else:
                    self._rest(server, failure)
                self._changed.notify_all()
        if back:
            _LOG.warning("model.teacher: %s answers again", server.url)

    def _failed(self, server: Server, failure: Failure) -> None:
        if failure.fault == "request":
            return
        with self._changed:
            if server.state == "up":  # else another request of the same moment has said so
                server.state = "resting" if failure.fault == "busy" else "down"
                self._rest(server, failure)
                _LOG.warning("model.teacher: %s failed (%s)", server.url, failure.reason)

    def _rest(self, server: Server, failure: Failure) -> None:
        pause = min(self._backoff * 2**server.failures, _LONGEST_PAUSE_S)
        server.failures += 1
        server.again_at = time.monotonic() + max(pause, failure.pause)
        server.last = failure.reason

    def _answered(self, server: Server) -> None:
        with self._changed:
            server.failures = 0

    def _release(self, server: Server) -> None:
        with self._changed:
            server.outstanding -= 1
            self._changed.notify()


def _given_up(server: Server, failure: Failure, tries: int) -> ScoringError:
    where = f"{server.where}: {server.url} does not score"
    if failure.fault != "request":
        where += f", after {tries} tries"
    late = "a larger model.teacher.timeout_s, or a smaller model.teacher.concurrency"
    return ScoringError(problem(where, got=failure.reason, hint=late if "answer within" in failure.reason else None))
