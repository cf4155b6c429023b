"""The quickstart under every strategy on two ranks: the same curve and export as one process, also when killed."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")
STEPS = 3
ARGUMENTS = [
    "fit", "--config", "quickstart", "--trainer.accelerator", "cpu", "--trainer.max_steps", str(STEPS),
    "--trainer.val_check_interval", "2", "--data.prompts_per_step", "4", "--model.sampler.group_size", "4",
    "--model.sampler.max_new_tokens", "12", "--model.tokens_per_micro_batch", "100",
    "--data.val.0.source.limit", "8", "--trainer.callbacks",
    '[{"class_path": "distillkit.training.checkpoints.LastCheckpoint", "init_args": {"every_n_steps": 1}}]',
]  # fmt: skip


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def fit(folder: Path, *more: str) -> str:
    done = run(folder, "-m", "distillkit", *ARGUMENTS, *more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def on_ranks(strategy: str, ranks: int) -> tuple[str, ...]:
    return "--trainer.strategy", strategy, "--trainer.devices", str(ranks)


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    timed = ("time/", "tokens_per_second/")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    fit(folder)
    return folder / "runs" / "quickstart"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_quickstart_is_the_same_run_and_goes_on_after_a_kill(strategy: str, one: Path, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    unbroken.mkdir()
    killed.mkdir()
    fit(unbroken, *on_ranks(strategy, 2))
    ours = unbroken / "runs" / "quickstart"
    exported = [load_file(folder / "student" / "model.safetensors") for folder in (ours, one)]
    assert sorted(exported[0]) == sorted(exported[1])
    for name, tensor in exported[1].items():
        # AdamW's first steps are as large for a gradient of rounding errors as for any other.
        assert (exported[0][name] - tensor).abs().mean() <= 1e-3 * (tensor.abs().mean()), name
    for row, single in zip(metrics(ours), metrics(one), strict=True):
        for name in ("train/reward", "train/completion_length", "val/held_out/pass@1"):
            assert row[name] == single[name], name

    done = run(
        killed, "-m", "tests.training.killer", "optimizer", str(STEPS), *ARGUMENTS, *on_ranks(strategy, 2)
    )  # dies in the last step
    assert done.returncode == -9, done.stdout[-3000:] + done.stderr[-3000:]
    if strategy in ("fsdp2", "deepspeed_stage_2"):
        shutil.copytree(killed, tmp_path / "one_rank", symlinks=True)
    said = fit(killed, *on_ranks(strategy, 2), "--ckpt_path", "last")
    assert "continuing runs/quickstart" in said
    resumed = killed / "runs" / "quickstart"
    assert metrics(resumed) == metrics(ours)
    again = load_file(resumed / "student" / "model.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in exported[0].items())

    if strategy == "fsdp2":  # its checkpoints are for any number of ranks
        fit(tmp_path / "one_rank", *on_ranks(strategy, 1), "--ckpt_path", "last")
        alone = metrics(tmp_path / "one_rank" / "runs" / "quickstart")
        assert [row["train/reward"] for row in alone] == [row["train/reward"] for row in metrics(ours)]
    if strategy == "deepspeed_stage_2":
        command = [*ARGUMENTS, *on_ranks(strategy, 1), "--ckpt_path", "last"]
        refused = run(tmp_path / "one_rank", "-m", "distillkit", *command)
        assert refused.returncode == 2 and "world size of 2 but the current world size is 1" in refused.stderr
        assert "try:      the trainer.devices and trainer.num_nodes that the run had" in refused.stderr
