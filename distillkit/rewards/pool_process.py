"""The parent's handle on one worker process: start it, ask it, kill it. `pool_worker` is the other end of the pipes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distillkit.errors import ScoringError, problem
from distillkit.rewards.pool_worker import frame

__all__ = ["PoolResult", "WorkerProcess"]

_BEGIN_WITHIN_S = 60.0
"""Seconds an idle worker may take to pick up an item; one that does not is as good as dead."""
_LOOK_EVERY_S = 0.5
_SCRIPT = Path(__file__).with_name("pool_worker.py")


@dataclass(frozen=True, kw_only=True)
class PoolResult:
    """What became of one item.

    `done`: `value` is what the function returned. `timed_out`: killed at the deadline. `crashed`: the process died or
    the function raised; `detail` says how. `seconds` of wall time since the work began.
    """

    status: Literal["done", "timed_out", "crashed"]
    value: Any = None
    detail: str = ""
    seconds: float = 0.0


class _Gone(Exception):
    """The process ended."""


class _Late(Exception):
    """The deadline passed."""


class WorkerProcess:
    """One process and the two pipes to it. Used by one thread."""

    def __init__(self) -> None:
        request_read, self._request = os.pipe()
        self._reply, reply_write = os.pipe()
        try:
            # From a thread that outlives the worker: Linux sends the parent-death signal when that *thread* ends.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(request_read), str(reply_write), str(os.getpid())],
                pass_fds=(request_read, reply_write),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except BaseException:
            os.close(self._request)
            os.close(self._reply)
            raise
        finally:
            os.close(request_read)
            os.close(reply_write)
        os.set_blocking(self._request, False)
        os.set_blocking(self._reply, False)
        self._received = bytearray()
        self.usable = True

    def prepare(self, setup: dict[str, Any], timeout_s: float) -> None:
        """Have the worker import its function and warm up."""
        where = f"verifier pool: a worker for {setup['function']} did not start"
        deadline = time.monotonic() + timeout_s
        try:
            self._send(setup, deadline)
            answer = self._receive(deadline)
        except _Late:
            raise ScoringError(
                problem(where, got=f"nothing within {timeout_s:g} s", expected="an import and a warm-up")
            ) from None
        except _Gone as gone:
            raise ScoringError(
                problem(where, got=str(gone), expected="a running process", hint="a larger memory_mb")
            ) from None
        if "failed" in answer:
            raise ScoringError(problem(where, got=answer["failed"].strip(), expected="a function that can be imported"))

    def ask(self, payload: Any, timeout_s: float) -> PoolResult:
        """Have one item worked on; afterwards `usable` says whether the worker can take another."""
        begun = time.monotonic()
        try:
            self._send({"payload": payload}, begun + _BEGIN_WITHIN_S)
            self._receive(begun + _BEGIN_WITHIN_S)
            begun = time.monotonic()
            answer = self._receive(begun + timeout_s)
        except _Late:
            self.usable = False
            seconds = time.monotonic() - begun
            return PoolResult(status="timed_out", detail=f"killed after {seconds:.1f} s", seconds=seconds)
        except _Gone as gone:
            self.usable = False
            return PoolResult(status="crashed", detail=str(gone), seconds=time.monotonic() - begun)
        seconds = time.monotonic() - begun
        if "error" in answer:
            self.usable = not answer.get("leaving", False)
            return PoolResult(status="crashed", detail=answer["error"], seconds=seconds)
        return PoolResult(status="done", value=answer["value"], seconds=seconds)

    def kill(self) -> None:
        """End the process, whatever it is doing, and release its pipes."""
        self.process.kill()
        self.process.wait()
        for fd in (self._request, self._reply):
            os.close(fd)

    def _send(self, value: Any, deadline: float) -> None:
        data = memoryview(frame(value))
        while data:
            self._wait(self._request, select.POLLOUT, deadline)
            try:
                data = data[os.write(self._request, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise _Gone(self._how_it_ended()) from None

    def _receive(self, deadline: float) -> Any:
        while True:
            if len(self._received) >= 4:
                end = 4 + struct.unpack(">I", self._received[:4])[0]
                if len(self._received) >= end:
                    body = bytes(self._received[4:end])
                    del self._received[:end]
                    return json.loads(body)
            self._wait(self._reply, select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(self._reply, 1 << 16)
                if not chunk:
                    raise _Gone(self._how_it_ended())
                self._received += chunk

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        """Return when `fd` is ready or the process has ended; the last look comes at or after the deadline."""
        poller = select.poll()
        poller.register(fd, event)
        while True:
            left = deadline - time.monotonic()
            if poller.poll(max(0.0, min(left, _LOOK_EVERY_S)) * 1000):
                return
            if self.process.poll() is not None and not poller.poll(0):
                raise _Gone(self._how_it_ended())
            if left <= 0:
                raise _Late

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code >= 0:
            return f"exit status {code}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
