"""Decompositions are asked for once, in memory and on disk, in one process and in several."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import distillkit
from distillkit.decomposition import Decomposition, ReasoningStep, parse, render
from distillkit.errors import ScoringError
from distillkit.rewards.gsrm.cache import DecompositionFiles, Decompositions, Recent
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided


class Counting(Decomposer):
    """One step per trace; remembers what it was asked. `late` is undecided the first time, `never` always."""

    def __init__(self, name: str = "counting") -> None:
        self.name = name
        self.asked: list[list[Item]] = []

    def identity(self) -> str:
        return self.name

    def decompose(self, items: Sequence[Item]) -> list[Decomposition | Undecided]:
        self.asked.append(list(items))
        return [self._one(*item) for item in items]

    def _one(self, problem: str, trace: str) -> Decomposition | Undecided:
        if trace == "never":
            return Undecided(reason="no")
        if trace == "late" and len(self.asked) == 1:
            return Undecided(reason="busy", lasting=False)
        return steps(problem, trace)


def steps(problem: str, trace: str) -> Decomposition:
    return Decomposition(steps=(ReasoningStep(meta=f"by {problem}", question=trace, answer="α ²"),), final=trace)


A, B, NEVER, LATE = (("p", trace) for trace in ("a", "b", "never", "late"))


def test_an_item_is_asked_for_once_and_all_that_are_new_together() -> None:
    decomposer = Counting()
    known = Decompositions(decomposer, None)
    assert known.of([A, B, A], [("q", "a"), A]) == {A: steps(*A), B: steps(*B), ("q", "a"): steps("q", "a")}
    assert known.of([A, ("p", "c")], [B]) == {A: steps(*A), ("p", "c"): steps("p", "c"), B: steps(*B)}
    assert known.of([], []) == {}
    assert decomposer.asked == [[("q", "a"), A, B], [("p", "c")]]


def test_what_may_be_decided_later_is_asked_again() -> None:
    decomposer = Counting()
    known = Decompositions(decomposer, None)
    assert known.of([LATE], [NEVER]) == {LATE: Undecided(reason="busy", lasting=False), NEVER: Undecided(reason="no")}
    assert known.of([LATE], [NEVER]) == {LATE: steps(*LATE), NEVER: Undecided(reason="no")}
    assert decomposer.asked == [[NEVER, LATE], [LATE]]


def test_students_pass_and_teachers_stay() -> None:
    decomposer = Counting()
    known = Decompositions(decomposer, None, students=2, teachers=100)
    for i in range(10):
        known.of([("p", f"s{i}")], [A])
    known.of([("p", "s9"), ("p", "s8"), ("p", "s0")], [A])
    assert decomposer.asked[-1] == [("p", "s0")]
    assert sum(A in asked for asked in decomposer.asked) == 1


def test_only_teachers_decompositions_are_on_disk(tmp_path: Path) -> None:
    decomposer = Counting()
    Decompositions(decomposer, tmp_path / "cache").of([A], [B, NEVER])
    [file] = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert file.read_text() == render(steps(*B)) + "\n"
    later = Counting()
    assert Decompositions(later, tmp_path / "cache").of([A], [B]) == {A: steps(*A), B: steps(*B)}
    assert later.asked == [[A]]


def test_a_teachers_trace_that_a_student_wrote_first_is_on_disk_too(tmp_path: Path) -> None:
    decomposer = Counting()
    known = Decompositions(decomposer, tmp_path)
    known.of([A], [])
    assert not list(tmp_path.rglob("*.txt"))
    assert known.of([A], [A]) == {A: steps(*A)}
    [file] = tmp_path.rglob("*.txt")
    assert file.read_text() == render(steps(*A)) + "\n" and decomposer.asked == [[A]]
    file.unlink()
    known.of([A], [A])
    assert not list(tmp_path.rglob("*.txt"))  # written once, and known since


def test_another_decomposer_problem_or_trace_is_another_entry(tmp_path: Path) -> None:
    Decompositions(Counting(), tmp_path).of([], [A])
    for decomposer, item in ((Counting("other"), A), (Counting(), ("q", "a")), (Counting(), ("p", "a "))):
        Decompositions(decomposer, tmp_path).of([], [item])
        assert decomposer.asked == [[item]]


@pytest.mark.parametrize("damage", [b"", b"Step 1\nMeta-rea", b"\xff\xfe\x00", b"Final answer: 3\n"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damage: bytes) -> None:
    Decompositions(Counting(), tmp_path).of([], [A])
    [file] = tmp_path.rglob("*.txt")
    file.write_bytes(damage)
    decomposer = Counting()
    assert Decompositions(decomposer, tmp_path).of([], [A]) == {A: steps(*A)}
    assert decomposer.asked == [[A]] and parse(file.read_text()) == steps(*A)


WORKER = """
import sys
from pathlib import Path
from tests.rewards.gsrm.test_cache import Counting, steps
from distillkit.rewards.gsrm.cache import Decompositions

decomposer = Counting()
cache = Decompositions(decomposer, Path(sys.argv[1]))
items = [("p", f"trace {i}" + " long" * 200) for i in range(int(sys.argv[2]))]
for item in items:
    assert cache.of([], [item]) == {item: steps(*item)}
print(len(decomposer.asked))
"""


def worker(folder: Path, count: int) -> subprocess.Popen[str]:
    root = str(Path(distillkit.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(folder), str(count)]
    return subprocess.Popen(
        command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_share_the_files(tmp_path: Path) -> None:
    together = [worker(tmp_path, 60) for _ in range(2)]
    asked = []
    for process in together:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        asked.append(int(out))
    assert all(0 <= count <= 60 for count in asked) and sum(asked) >= 60
    assert len(list(tmp_path.rglob("*.txt"))) == 60 and not list(tmp_path.rglob("*.tmp"))
    later = worker(tmp_path, 60)
    out, err = later.communicate(timeout=120)
    assert (later.returncode, out) == (0, "0\n"), err


def test_recent_forgets_what_was_not_used_for_longest() -> None:
    recent: Recent[str, int] = Recent(2)
    recent["a"], recent["b"] = 1, 2
    assert recent.get("a") == 1
    recent["c"] = 3
    assert (recent.get("a"), recent.get("b"), recent.get("c"), len(recent)) == (1, None, 3, 2)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScoringError) as caught:
        DecompositionFiles(tmp_path / "file" / "cache", "x")
    assert str(caught.value).startswith(
        f"model.rewards: gsrm.cache_dir: cannot make the folder\n    got:      {tmp_path / 'file' / 'cache'} ("
    )


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    cache = Decompositions(Counting(), tmp_path)
    for name in (f"{i:02x}" for i in range(256)):
        (tmp_path / name).write_text("in the way")
    with pytest.raises(ScoringError) as caught:
        cache.of([], [A])
    lines = str(caught.value).split("\n")
    assert (
        lines[0] == "model.rewards: gsrm.cache_dir: cannot write"
        and lines[-1] == "    try:      free disk space, or null"
    )
