"""The verifier pool: a deadline from the start of the work, dead workers replaced, nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distillkit.errors import ConfigError, ScoringError
from distillkit.rewards.pool import VerifierPool

ACT = "tests.rewards.hostile.act"
ROOT = Path(__file__).parents[2]


def do(what: str, value: Any = None) -> dict[str, Any]:
    return {"do": what, "with": value}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(ACT, workers=2, timeout_s=1.0, memory_mb=1024) as pool:
        yield pool


def test_results_come_in_the_order_of_the_items(pool: VerifierPool) -> None:
    items = [do("sleep", 0.2), *[do("echo", i) for i in range(20)]]
    assert [result.value for result in pool.run(items)] == [0.2, *range(20)]
    assert pool.run([]) == []


@pytest.mark.parametrize("text", ["\x00", "\ud800 lone", "\U0001f600", "{" * 1_000_000, "", None, [1, {"a": 2.5}]])
def test_any_json_value_crosses_unharmed(pool: VerifierPool, text: object) -> None:
    [result] = pool.run([do("echo", text)])
    assert (result.status, result.value) == ("done", text)


@pytest.mark.parametrize("hang", ["hang_in_python", "hang_in_c", "sleep"])
def test_a_hung_worker_is_killed_at_the_deadline_and_replaced(pool: VerifierPool, hang: str) -> None:
    before, replaced = set(pool.pids), pool.replaced
    start = time.monotonic()
    hung, *others = pool.run([do(hang, 600.0), *[do("echo", i) for i in range(8)]])
    assert hung.status == "timed_out" and 1.0 <= hung.seconds < 10.0 and time.monotonic() - start < 30.0
    assert [(result.status, result.value) for result in others] == [("done", i) for i in range(8)]
    assert eventually(lambda: len(pool.pids) == 2 and len(set(pool.pids) & before) == 1)
    assert pool.replaced == replaced + 1
    assert not any(alive(pid) for pid in before - set(pool.pids))


@pytest.mark.parametrize(
    ("item", "detail"),
    [
        (do("segfault"), "killed by SIGSEGV"),
        (do("exit_now", 3), "exit status 3"),
        (do("leave", 4), "exit status 4"),
        (do("eat_memory", 4096), "MemoryError: more than 1024 MiB"),
        (do("raise_error", "no"), "ValueError: no"),
        (do("recurse"), "RecursionError: maximum recursion depth exceeded"),
        (do("not_json"), "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_a_crash_costs_its_own_item_and_says_how(pool: VerifierPool, item: dict[str, Any], detail: str) -> None:
    crashed, *others = pool.run([item, *[do("echo", i) for i in range(4)]])
    assert (crashed.status, crashed.value) == ("crashed", None) and crashed.detail.startswith(detail)
    assert [(result.status, result.value) for result in others] == [("done", i) for i in range(4)]
    assert eventually(lambda: len(pool.pids) == 2 and all(map(alive, pool.pids)))


def test_what_a_worker_prints_does_not_disturb_the_answers(pool: VerifierPool, capfd: pytest.CaptureFixture) -> None:
    assert [result.value for result in pool.run([do("chatter", "noise\n")] * 3)] == ["noise\n"] * 3
    assert capfd.readouterr() == ("", "")


def test_a_worker_imports_neither_torch_nor_the_main_module(pool: VerifierPool) -> None:
    [result] = pool.run([do("modules", ["torch", "transformers", "lightning", "pytest", "distillkit.components"])])
    assert result.value == []
    with VerifierPool("distillkit.rewards.math_answers.judge", workers=1) as verifier:
        [pid] = verifier.pids
        verifier.run([{"gold": "1", "answer": "2"}])
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_waiting_in_the_queue_costs_nothing_of_the_deadline() -> None:
    with VerifierPool(ACT, workers=1, timeout_s=1.5) as pool:
        results = pool.run([do("sleep", 0.6)] * 5)
    assert [result.status for result in results] == ["done"] * 5  # the last after 2.4 s in the queue


def test_starting_and_warming_up_cost_nothing_of_the_deadline() -> None:
    with VerifierPool(ACT, workers=1, timeout_s=0.6, warm_up=do("sleep", 1.0)) as pool:
        results = pool.run([do("echo", 1), do("hang_in_c"), do("echo", 2)])
    assert [result.status for result in results] == ["done", "timed_out", "done"]


def test_the_clock_of_an_item_starts_when_its_worker_begins() -> None:
    """A worker that is stopped before it picks the item up, here by a signal, has not begun."""
    with VerifierPool(ACT, workers=1, timeout_s=0.8) as pool:
        [pid] = pool.pids
        os.kill(pid, signal.SIGSTOP)
        waker = threading.Timer(2.0, os.kill, (pid, signal.SIGCONT))
        waker.start()
        [result] = pool.run([do("sleep", 0.1)])
        waker.join()
    assert result.status == "done"


def test_it_works_off_the_main_thread_and_from_several_at_once() -> None:
    outcome: dict[int, list[Any]] = {}
    pool = VerifierPool(ACT, workers=2, timeout_s=5.0)

    def work(k: int) -> None:
        outcome[k] = [result.value for result in pool.run([do("echo", [k, i]) for i in range(10)])]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcome == {k: [[k, i] for i in range(10)] for k in range(3)}
    assert len(pool.pids) == 2 and all(map(alive, pool.pids)), "workers died with the thread that started them"
    pool.close()


def test_close_kills_busy_workers_and_the_pool_starts_again() -> None:
    pool = VerifierPool(ACT, workers=2, timeout_s=60.0)
    pool.start()
    pids = pool.pids
    failed: list[BaseException] = []

    def work() -> None:
        try:
            pool.run([do("hang_in_c")] * 4)
        except ScoringError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    pool.close()
    thread.join(timeout=20)
    assert [str(error).splitlines()[0] for error in failed] == ["verifier pool"]
    assert pool.pids == () and not any(map(alive, pids))
    assert [result.value for result in pool.run([do("echo", "again")])] == ["again"]
    pool.close()


def test_a_forgotten_pool_is_closed_with_its_last_reference() -> None:
    pool = VerifierPool(ACT, workers=1)
    pool.start()
    [pid] = pool.pids
    del pool
    gc.collect()
    assert eventually(lambda: not alive(pid))


SCRIPT = textwrap.dedent(
    """
    import sys, threading, time
    from distillkit.rewards.pool import VerifierPool

    pool = VerifierPool("tests.rewards.hostile.act", workers=2, timeout_s=600.0)
    pool.start()
    print(*pool.pids, flush=True)
    if sys.argv[1] != "idle":
        threading.Thread(target=pool.run, args=([{"do": sys.argv[1], "with": 600.0}] * 2,), daemon=True).start()
        time.sleep(0.5)
    print("busy", flush=True)
    if sys.argv[2] == "stay":
        time.sleep(600)
    """
)


@pytest.mark.parametrize("doing", ["idle", "sleep", "hang_in_c"])
@pytest.mark.parametrize("end", ["stay", "leave"])
def test_no_worker_outlives_its_parent(tmp_path: Path, doing: str, end: str) -> None:
    """Without `close`: killed with SIGKILL (stay), or at the end of a script that has no `__main__` guard (leave)."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(script), doing, end],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert parent.stdout.readline() == "busy\n"
    if end == "stay":
        assert len(pids) == 2 and all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    assert parent.wait(timeout=30) == (-signal.SIGKILL if end == "stay" else 0)
    parent.stdout.close()
    assert len(pids) == 2 and eventually(lambda: not any(map(alive, pids)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_parents_workers_alone(pool: VerifierPool) -> None:
    pids = pool.pids
    child = os.fork()
    if child == 0:
        pool.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert all(map(alive, pids)) and [result.value for result in pool.run([do("echo", 1)])] == [1]


def test_a_function_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ScoringError) as caught:
        VerifierPool("tests.rewards.hostile.nothing", workers=1).start()
    text = str(caught.value)
    assert text.startswith(
        "verifier pool: a worker for tests.rewards.hostile.nothing did not start\n    got:      Trace"
    )
    assert text.endswith(
        "AttributeError: module 'tests.rewards.hostile' has no attribute 'nothing'\n"
        "    expected: a function that can be imported"
    )


def test_a_worker_that_never_gets_ready_is_given_up() -> None:
    pool = VerifierPool(ACT, workers=1, warm_up=do("sleep", 600.0), start_timeout_s=0.5)
    with pytest.raises(ScoringError) as caught:
        pool.start()
    assert str(caught.value) == (
        "verifier pool: a worker for tests.rewards.hostile.act did not start\n"
        "    got:      nothing within 0.5 s\n"
        "    expected: an import and a warm-up"
    )
    assert pool.pids == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "VerifierPool.workers\n    got:      0\n    expected: more than 0"),
        ({"timeout_s": 0.0}, "VerifierPool.timeout_s\n    got:      0.0\n    expected: more than 0"),
        ({"memory_mb": -1}, "VerifierPool.memory_mb\n    got:      -1\n    expected: more than 0"),
        ({"function": "act"}, "VerifierPool.function\n    got:      act\n    expected: package.module.function"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VerifierPool(**{"function": ACT, **arguments})
    assert str(caught.value) == message
