"""A pool of worker processes that can be killed: verification that cannot hang, lie or leave processes behind.

One thread of this process owns one worker process and hands it one item at a time, so

* the deadline of an item starts when its worker reports that it has begun, not when the item was queued or the worker
  was started;
* a worker that passes the deadline gets SIGKILL, inside C code too, and a new one takes its place, imported and warm
  before it is given anything; the other workers notice nothing;
* a worker that dies (segmentation fault, `os._exit`, out of memory) costs the item that it was at, no other;
* workers go with the pool: at `close`, at the end of this process, and when this process is killed.

It works from any thread. Only JSON crosses the pipes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.rewards.pool_process import PoolResult, WorkerProcess

__all__ = ["PoolResult", "VerifierPool"]


class VerifierPool:
    """Calls one function in worker processes, each item under a deadline.

    Args:
        function: dotted path of a module-level function that takes and returns one JSON value.
        workers: processes.
        timeout_s: seconds of wall time for one item, from the start of the work in the worker.
        memory_mb: address space of a worker in MiB (RLIMIT_AS); None for no limit. Beyond it the item crashes.
        warm_up: a first item for each new worker, before it serves: imports and caches are paid for there.
        start_timeout_s: seconds for a worker to import the function and warm up.
        owner: whose arguments these are, for error texts.

    Raises:
        ConfigError: an argument out of range.

    Example:
        >>> with VerifierPool("math.sqrt", workers=1, timeout_s=5.0) as pool:
        ...     [result.value for result in pool.run([4, 9])], pool.run([-1])[0].detail
        ([2.0, 3.0], 'ValueError: math domain error')
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_mb: int | None = 4096,
        warm_up: Any = None,
        start_timeout_s: float = 120.0,
        owner: str = "VerifierPool",
    ) -> None:
        for name, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            if value is not None and not value > 0:
                raise ConfigError(problem(f"{owner}.{name}", got=value, expected="more than 0"))
        if "." not in function:
            raise ConfigError(problem(f"{owner}.function", got=function, expected="package.module.function"))
        self._setup = {"function": function, "memory_mb": memory_mb, "warm_up": warm_up}
        self._workers = workers
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._crew: _Crew | None = None

    def __enter__(self) -> VerifierPool:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers and wait until each is ready. Nothing happens when they are running.

        Raises:
            ScoringError: a worker did not start, with its own error.
        """
        self._started()

    def _started(self) -> _Crew:
        with self._lock:
            if self._crew is not None and self._crew.owner == os.getpid():
                return self._crew
            setup = {**self._setup, "path": [entry or os.getcwd() for entry in sys.path]}
            crew = _Crew(setup=setup, timeout_s=self._timeout_s, start_timeout_s=self._start_timeout_s)
            crew.finalizer = weakref.finalize(self, _dismiss, crew)
            ready: list[Future[None]] = [Future() for _ in range(self._workers)]
            for i, future in enumerate(ready):
                thread = threading.Thread(target=_serve, args=(crew, future), name=f"verifier-{i}", daemon=True)
                crew.threads.append(thread)
                thread.start()
            try:
                for future in ready:
                    future.result()
            except BaseException:
                crew.finalizer()
                raise
            self._crew = crew
            return crew

    def run(self, payloads: Sequence[Any]) -> list[PoolResult]:
        """Return one result per payload, in order. Callable from several threads at once.

        Raises:
            ScoringError: a killed worker could not be replaced, or the pool was closed meanwhile.
        """
        crew = self._started()
        jobs = [_Job(payload) for payload in payloads]
        with crew.lock:
            if crew.closed:
                raise _closed()
            for job in jobs:
                crew.jobs.put(job)
        try:
            return [job.result.result() for job in jobs]
        finally:
            for job in jobs:
                job.result.cancel()

    def close(self) -> None:
        """Kill the workers and wait for them to be gone. The pool can be started again."""
        with self._lock:
            if self._crew is not None and self._crew.finalizer is not None:
                self._crew.finalizer()
            self._crew = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that are alive."""
        return () if self._crew is None else tuple(worker.process.pid for worker in tuple(self._crew.alive))

    @property
    def replaced(self) -> int:
        """Workers that were killed or died, and were replaced, since the pool was started."""
        return 0 if self._crew is None else self._crew.replaced


@dataclass(eq=False)
class _Job:
    payload: Any
    result: Future[PoolResult] = field(default_factory=Future)


@dataclass(eq=False)
class _Crew:
    """What the threads of one pool share; not the pool itself, so that a forgotten pool is collected and closed."""

    setup: dict[str, Any]
    timeout_s: float
    start_timeout_s: float
    owner: int = field(default_factory=os.getpid)
    jobs: queue.SimpleQueue[_Job | None] = field(default_factory=queue.SimpleQueue)
    alive: set[WorkerProcess] = field(default_factory=set)
    threads: list[threading.Thread] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    closed: bool = False
    replaced: int = 0
    finalizer: weakref.finalize[Any, Any] | None = None

    def hire(self) -> WorkerProcess:
        with self.lock:
            if self.closed:
                raise _closed()
            worker = WorkerProcess()
            self.alive.add(worker)
        try:
            worker.prepare(self.setup, self.start_timeout_s)
        except BaseException:
            self.fire(worker)
            raise
        return worker

    def fire(self, worker: WorkerProcess) -> None:
        worker.kill()
        with self.lock:
            self.alive.discard(worker)


def _closed() -> ScoringError:
    return ScoringError(problem("verifier pool", got="closed while items were waiting", expected="an open pool"))


def _dismiss(crew: _Crew) -> None:
    """End every worker and thread of `crew`. Harmless in a forked child, whose parent still uses them."""
    if crew.owner != os.getpid():
        return
    with crew.lock:
        crew.closed = True
        alive = tuple(crew.alive)
    for worker in alive:
        worker.process.kill()
    for _ in crew.threads:
        crew.jobs.put(None)
    for thread in crew.threads:
        if thread is not threading.current_thread():
            thread.join(timeout=10.0)
    with contextlib.suppress(queue.Empty):
        while True:
            if (job := crew.jobs.get_nowait()) is not None and job.result.set_running_or_notify_cancel():
                job.result.set_exception(_closed())


def _serve(crew: _Crew, ready: Future[None]) -> None:
    """One thread: own one worker, from its start to its end, and feed it."""
    worker: WorkerProcess | None = None
    try:
        worker = crew.hire()
    except BaseException as error:
        ready.set_exception(error)
        return
    ready.set_result(None)
    while (job := crew.jobs.get()) is not None:
        if not job.result.set_running_or_notify_cancel():
            continue
        try:
            worker = worker or crew.hire()
            outcome = worker.ask(job.payload, crew.timeout_s)
            if crew.closed:
                raise _closed()
        except BaseException as error:
            if worker is not None:
                crew.fire(worker)
                worker = None
            job.result.set_exception(error)
            continue
        crew.replaced += not worker.usable
        job.result.set_result(outcome)
        if not worker.usable:
            crew.fire(worker)
            worker = None
            with contextlib.suppress(ScoringError):
                worker = crew.hire()
    if worker is not None:
        crew.fire(worker)
