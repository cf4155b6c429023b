"""A run that is killed anywhere and continued is, bit for bit, the run that was never killed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 4
ARGUMENTS = [
    "fit", "--config", "quickstart", "--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "2",
    "--data.prompts_per_step", "4", "--model.sampler.group_size", "4", "--model.sampler.max_new_tokens", "12",
    "--model.inner_epochs", "2", "--data.val.0.source.limit", "8", "--trainer.callbacks",
    '[{"class_path": "distillkit.training.checkpoints.LastCheckpoint", "init_args": {"every_n_steps": 1}}]',
]  # fmt: skip

KILLS = {
    "rollout": 5,
    "teacher": 3,
    "reward": 5,
    "old_policy": 3,
    "update": 5,
    "optimizer": 6,
    "validation": 2,
    "checkpoint": 3,
}
"""Phase -> the call at which the process dies: always in or after step 2, when one checkpoint or more is there."""


def run(folder: Path, *command: str, killed: bool = False) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == (-9 if killed else 0), done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    if isinstance(ours, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [path]
    if isinstance(ours, dict):
        keys = {**ours, **theirs}
        return [d for key in keys for d in differences(ours.get(key), theirs.get(key), f"{path}/{key}")]
    if isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return [path]
        return [d for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    return [] if ours == theirs else [path]


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    timed = ("time/", "tokens_per_second/")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def without_paths(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.items() if key != "callbacks"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, "-m", "distillkit", *ARGUMENTS)
    return folder / "runs" / "quickstart"


@pytest.mark.parametrize("phase", KILLS)
def test_killed_and_continued_equals_never_killed(phase: str, unbroken: Path, tmp_path: Path) -> None:
    run(tmp_path, "-m", "tests.training.killer", phase, str(KILLS[phase]), *ARGUMENTS, killed=True)
    folder = tmp_path / "runs" / "quickstart"
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["distillkit"]["rollout_step"]
    assert 1 <= saved < STEPS

    said = run(tmp_path, "-m", "distillkit", *ARGUMENTS, "--ckpt_path", "last")
    assert "continuing runs/quickstart" in said
    ours, theirs = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (folder, unbroken))
    assert differences(without_paths(ours), without_paths(theirs)) == []
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [str(step) for step in range(STEPS + 1)]
    assert rows == metrics(unbroken)
    last = f"step-{STEPS:06d}.jsonl"
    assert (folder / "rollouts" / last).read_bytes() == (unbroken / "rollouts" / last).read_bytes()


def test_killed_before_the_first_checkpoint_says_so_and_starts_over_beside_it(tmp_path: Path) -> None:
    run(tmp_path, "-m", "tests.training.killer", "teacher", "1", *ARGUMENTS, killed=True)
    first = tmp_path / "runs" / "quickstart"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    said = run(tmp_path, "-m", "distillkit", *ARGUMENTS, "--ckpt_path", "last")
    assert "runs/quickstart was stopped before its first checkpoint; starting over in runs/quickstart-2" in said
    assert [row["step"] for row in metrics(tmp_path / "runs" / "quickstart-2")] == [str(s) for s in range(STEPS + 1)]
    assert all(path.read_bytes() == content for path, content in before.items())
