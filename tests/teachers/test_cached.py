"""The cache of teacher scores: what names an entry, both bounds, damage, threads, and several processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distillkit.components import StudentInfo
from distillkit.errors import ConfigError, ScoringError
from distillkit.teachers._score_store import ScoreFiles, ScoreMemory
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.extrapolated import ExtrapolatedTeacher
from distillkit.teachers.mixture import MixtureTeacher
from distillkit.testing import FakeTeacher, check, student_info
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores
from tests import toy
from tests.teachers.cache_worker import REQUEST, PerToken, batch, wrong

ROOT = Path(__file__).parents[2]
GIB = 2**30


class Watched(PerToken):
    """Says how many rollouts it was asked about."""

    def __init__(self, *, label: str = "a") -> None:
        super().__init__()
        self.label = label
        self.asked: list[int] = []

    def identity(self) -> str:
        return f"watched:{self.label}"

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        self.asked.append(len(rollouts))
        return super().score(rollouts, request)


def cached(folder: Path, student: StudentInfo | None = None, **arguments: Any) -> tuple[CachedTeacher, Watched]:
    teacher = Watched(label=arguments.pop("label", "a"))
    part = CachedTeacher(teacher=teacher, dir=str(folder), **arguments)
    part.setup(student or student_info())
    return part, teacher


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_each_rollout_is_scored_once_and_the_rest_comes_from_memory_or_disk(tmp_path: Path) -> None:
    part, teacher = cached(tmp_path)
    first, second = batch([1, 2, 3, 2]), batch([3, 4])
    assert not wrong(part.score(first, REQUEST), first)
    assert teacher.asked == [3] and len(files(tmp_path)) == 3
    assert not wrong(part.score(second, REQUEST), second)
    assert teacher.asked == [3, 1]
    assert part.counts == {"memory": 2, "disk": 0, "scored": 4}
    again, other = cached(tmp_path, max_memory_gib=0)
    assert not wrong(again.score(first, REQUEST), first)
    assert not wrong(again.score(first, REQUEST), first)
    assert other.asked == [] and again.counts == {"memory": 2, "disk": 6, "scored": 0}


def test_an_entry_is_named_by_everything_that_the_score_depends_on(tmp_path: Path) -> None:
    rollouts = batch([1, 2])
    cached(tmp_path)[0].score(rollouts, REQUEST)
    words = student_info().tokenizer
    words.add_tokens(["<more>"])
    masked = rollouts.loss_mask.clone()
    masked[0, int(rollouts.prompt_lengths[0])] = False
    for student, arguments, request, given in (
        (None, {"label": "b"}, REQUEST, rollouts),
        (replace(student_info(), tokenizer=words), {}, REQUEST, rollouts),
        (replace(student_info(), vocab_limit=90), {}, REQUEST, rollouts),
        (None, {}, replace(REQUEST, temperature=0.5), rollouts),
        (None, {}, replace(REQUEST, topk=2), rollouts),
    ):
        part, teacher = cached(tmp_path, student, **arguments)
        part.score(given, request)
        assert teacher.asked == [2]
    part, teacher = cached(tmp_path)
    part.score(replace(rollouts, loss_mask=masked), REQUEST)
    assert teacher.asked == [1]


def test_padding_does_not_name_an_entry_and_its_own_is_0(tmp_path: Path) -> None:
    part, teacher = cached(tmp_path)
    prompts = [[3, 4], [5, 6, 7, 8]]
    rollouts = toy.batch(prompts)
    part.score(rollouts, REQUEST)
    asked = sum(teacher.asked)
    index = torch.tensor([int(i) for i in rollouts.lengths.argsort()[:3]])
    few = rollouts.select(index)
    assert few.tokens.shape[1] < rollouts.tokens.shape[1]
    scores = part.score(few, REQUEST)
    assert sum(teacher.asked) == asked and not wrong(scores, few)
    assert scores.sampled is not None and not scores.sampled[~few.attention_mask].any()


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, b"half"])
def test_a_damaged_file_is_scored_again_and_written_anew(damage: bytes, tmp_path: Path) -> None:
    cached(tmp_path)[0].score(batch([1]), REQUEST)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] if damage == b"half" else damage)
    part, teacher = cached(tmp_path)
    assert not wrong(part.score(batch([1]), REQUEST), batch([1]))
    assert teacher.asked == [1] and file.read_bytes() == whole


def test_memory_keeps_what_was_used_last_within_its_bound() -> None:
    memory = ScoreMemory(100)
    for i in range(5):
        memory.put(str(i), {"sampled": torch.full((10,), float(i))})
    assert [memory.get(str(i)) is not None for i in range(5)] == [False, False, False, True, True]
    memory.get("3")
    memory.put("5", {"sampled": torch.zeros(5), "topk": torch.zeros(5)})
    assert memory.get("4") is None and memory.get("3") is not None and memory.get("5") is not None
    memory.put("6", {"sampled": torch.zeros(26)})
    assert memory.get("6") is None
    memory.put("7", {"sampled": torch.zeros(25)})
    memory.put("7", {"sampled": torch.zeros(25)})
    assert memory.get("7") is not None


def test_an_entry_in_memory_does_not_hold_the_batch_that_it_came_with(tmp_path: Path) -> None:
    part, _ = cached(tmp_path)
    part.score(batch(list(range(30))), REQUEST)
    assert part._stores is not None
    for entry in part._stores[0]._kept.values():
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in entry.values())


def test_the_files_used_longest_ago_are_removed(tmp_path: Path) -> None:
    store = ScoreFiles(tmp_path, bound=1200)
    entry = {"sampled": torch.zeros(50)}
    store.put("aa", entry)
    size = files(tmp_path)[0].stat().st_size
    assert 240 < size < 300
    for i, key in enumerate(("bb", "cc", "dd")):
        store.put(key, entry)
        os.utime(tmp_path / key / f"{key}.safetensors", (i + 1.0, i + 1.0))
    assert store.get("bb") is not None  # used now: "cc" is the oldest
    store.trim()
    assert len(files(tmp_path)) == 4
    store.put("ee", entry)
    store.trim()
    assert [path.stem for path in files(tmp_path)] == ["aa", "bb", "dd", "ee"]
    assert store.get("cc") is None


def test_without_a_bound_nothing_is_removed_or_touched(tmp_path: Path) -> None:
    store = ScoreFiles(tmp_path)
    store.put("aa", {"sampled": torch.zeros(50)})
    (file,) = files(tmp_path)
    os.utime(file, (1.0, 1.0))
    assert store.get("aa") is not None
    store.trim()
    assert file.stat().st_mtime == 1.0


def test_what_killed_processes_left_is_removed_with_time(tmp_path: Path) -> None:
    store = ScoreFiles(tmp_path, bound=10**6)
    store.put("aa", {"sampled": torch.zeros(50_000)})
    old, young = tmp_path / "aa" / "x.tmp", tmp_path / "aa" / "y.tmp"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    hours = time.time() - 2 * 3600
    os.utime(old, (hours, hours))
    store.trim()
    assert not old.exists() and young.exists() and len(files(tmp_path)) == 1


def test_while_another_process_removes_this_one_does_not(tmp_path: Path) -> None:
    import fcntl

    store = ScoreFiles(tmp_path, bound=300)
    for key in ("aa", "bb", "cc"):
        store.put(key, {"sampled": torch.zeros(50)})
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        store.trim()
        assert len(files(tmp_path)) == 3
    store.trim()
    assert len(files(tmp_path)) == 1


def run(folder: Path, seed: int, rounds: int, bound: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.teachers.cache_worker", str(folder), str(seed), str(rounds), str(bound)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_several_processes_write_read_and_remove_at_once(tmp_path: Path) -> None:
    cached(tmp_path / "one", label="a")[0].score(batch([1]), REQUEST)
    size = files(tmp_path / "one")[0].stat().st_size
    bound = 20 * size  # a third of the 60 rollouts they draw from: nearly every round removes files
    shared = tmp_path / "shared"
    workers = [run(shared, seed, 150, bound / GIB) for seed in range(4)]
    counts = []
    for worker in workers:
        out, error = worker.communicate(timeout=240)
        assert worker.returncode == 0, error[-3000:]
        counts.append(json.loads(out))
    assert all(sum(count.values()) == 1200 for count in counts)
    assert all(count["disk"] > 0 and count["scored"] > 60 for count in counts), counts
    left = sum(path.stat().st_size for path in files(shared))
    assert 0 < left <= bound + 4 * 8 * size  # what each may have written after the last look
    assert not list(shared.rglob("*.tmp"))


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_that_reads_wrong(tmp_path: Path) -> None:
    victim = run(tmp_path, 1, 10**6, 1.0)
    deadline = time.monotonic() + 120
    while len(files(tmp_path)) < 20:
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    part = CachedTeacher(teacher=PerToken(), dir=str(tmp_path), max_memory_gib=0)
    part.setup(student_info())
    everything = batch(list(range(60)))
    assert not wrong(part.score(everything, REQUEST), everything)
    assert part.counts["disk"] >= 20


def test_threads_share_one_cache(tmp_path: Path) -> None:
    part, teacher = cached(tmp_path, max_memory_gib=2000 / GIB, max_disk_gib=5000 / GIB)
    together = threading.Barrier(4)

    def work(seed: int) -> int:
        together.wait()
        for turn in range(40):
            rollouts = batch([(seed + turn + i) % 30 for i in range(6)])
            assert not wrong(part.score(rollouts, REQUEST), rollouts)
        return 40 * 6

    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(work, range(4)))
    counts = part.counts
    assert sum(counts.values()) == total and counts["scored"] == sum(teacher.asked)
    assert counts["memory"] > 0


def test_conformance(tmp_path: Path) -> None:
    check(CachedTeacher(teacher=FakeTeacher(), dir=str(tmp_path), max_memory_gib=0, max_disk_gib=1e-6))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_memory_gib": -1.0}, "model.teacher.max_memory_gib\n    got:      -1.0"),
        ({"max_memory_gib": float("nan")}, "model.teacher.max_memory_gib\n    got:      nan"),
        (
            {"max_disk_gib": 0.0},
            "model.teacher.max_disk_gib\n    got:      0.0\n    expected: a finite number above 0, or",
        ),
    ],
)
def test_bounds_that_cannot_work_are_refused(arguments: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        CachedTeacher(teacher=FakeTeacher(), dir=str(tmp_path), **arguments)
    assert text in str(caught.value)


def test_scores_that_depend_on_the_row_are_not_cached_and_each_teacher_of_a_mixture_may_be(tmp_path: Path) -> None:
    by_row = MixtureTeacher(teachers={"a": FakeTeacher()}, route="kind")
    for part in (
        by_row,
        ExtrapolatedTeacher(teacher=by_row, base=FakeTeacher()),
        MixtureTeacher(teachers={"m": by_row}),
    ):
        with pytest.raises(ConfigError, match="its scores depend on more than the token ids"):
            CachedTeacher(teacher=part, dir=str(tmp_path))
    average = CachedTeacher(teacher=MixtureTeacher(teachers={"a": FakeTeacher()}), dir=str(tmp_path))
    inside = CachedTeacher(teacher=FakeTeacher(), dir=str(tmp_path))
    check(MixtureTeacher(teachers={"a": average, "b": inside}))


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScoringError, match=r"model\.teacher\.dir: cannot make the folder"):
        cached(tmp_path / "file" / "cache")
    part, _ = cached(tmp_path / "cache")
    for folder in range(256):
        (tmp_path / "cache" / f"{folder:02x}").write_text("")
    with pytest.raises(ScoringError, match=r"model\.teacher\.dir: cannot write"):
        part.score(batch([1]), REQUEST)
