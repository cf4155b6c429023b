"""Run folders: names of files, status, locks, and what may be discarded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distillkit.errors import ConfigError, DataError
from distillkit.reporting.run_folder import RunFolder, RunStatus, atomic_write_text


def test_every_file_has_its_place() -> None:
    run = RunFolder(Path("runs/a"))
    properties = [name for name, value in vars(RunFolder).items() if isinstance(value, property) and name != "name"]
    assert {name: getattr(run, name).relative_to(run.path).as_posix() for name in properties} == {
        "recipe_yaml": "recipe.yaml",
        "config_yaml": "config.yaml",
        "environment_json": "environment.json",
        "status_json": "status.json",
        "metrics_csv": "metrics.csv",
        "rollouts": "rollouts",
        "eval": "eval",
        "plots": "plots",
        "checkpoints": "checkpoints",
        "last_ckpt": "checkpoints/last.ckpt",
        "student": "student",
    }
    assert run.name == "a"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    atomic_write_text(path, "old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"


def test_status_is_kept_over_a_continued_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.status() is None
    run.begin("quickstart", "fit")
    first = run.status()
    assert first is not None
    assert (first.config_name, first.command, first.state, first.reason) == ("quickstart", "fit", "running", "")
    run.end("failed", "RuntimeError: broke")
    assert run.status() == RunStatus(
        config_name="quickstart", command="fit", state="failed", started=first.started, reason="RuntimeError: broke"
    )
    run.status_json.write_text(run.status_json.read_text().replace(first.started, "2020-01-01T00:00:00+0000"))
    run.begin("quickstart", "fit")
    again = run.status()
    assert again is not None
    assert (again.state, again.started, again.reason) == ("running", "2020-01-01T00:00:00+0000", "")


def test_ending_a_run_that_never_began_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path).end("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", '{"config_name": "x"}', "[1]"])
def test_a_damaged_status_is_named(tmp_path: Path, text: str) -> None:
    run = RunFolder(tmp_path)
    run.status_json.write_text(text)
    with pytest.raises(DataError, match=r"status\.json: not a status file"):
        run.status()


def test_records_are_merged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record({"a": 1, "b": {"x": 1}})
    run.record({"b": {"y": Path("p")}})
    assert json.loads(run.environment_json.read_text()) == {"a": 1, "b": {"y": "p"}}


HOLD = "import sys; from pathlib import Path; from distillkit.reporting.run_folder import RunFolder;"
HOLD += "RunFolder(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError) as caught:
        run.lock()
    assert str(caught.value) == (
        f"{tmp_path}: another process is running in this folder\n"
        "    expected: a run that was stopped or killed\n"
        "    try:      wait for it, or leave out --ckpt_path last to start a new run"
    )
    holder.kill()
    holder.wait()
    run.lock()


def test_only_a_folder_with_nothing_but_our_first_files_is_discarded(tmp_path: Path) -> None:
    for extra, gone in ((None, True), ("metrics.csv", False), ("checkpoints", False)):
        run = RunFolder(tmp_path / str(extra))
        run.path.mkdir()
        run.lock()
        run.begin("x", "fit")
        run.record({})
        if extra:
            (run.path / extra).mkdir() if extra == "checkpoints" else (run.path / extra).write_text("step\n")
        run.discard()
        assert run.path.exists() is not gone
        assert run.status_json.exists() is not gone
    RunFolder(tmp_path / "absent").discard()
