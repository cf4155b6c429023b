"""Two ranks under every strategy train as one process does, also when one of them has nothing left to do."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.ranks import CASES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")


def train(strategy: str, folder: Path, ranks: int) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "tests.training.ranks", strategy, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("auto", tmp_path_factory.mktemp("one"), ranks=1)


@pytest.fixture(scope="module", params=STRATEGIES)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(request.param, tmp_path_factory.mktemp(request.param), ranks=2)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def student(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "student" / "model.safetensors")


def test_no_worker_thread_of_a_process_group_outlives_the_interpreter(two: Path) -> None:
    assert all((two / f"ended-{rank}").exists() for rank in range(2))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case: str, one: Path, two: Path) -> None:
    ours, theirs = two / case, one / case
    gradients = [flat(torch.load(f / "gradient.pt", weights_only=True)) for f in (ours, theirs)]
    if case == "infinite-loss":
        assert not any(bool(g.isfinite().all()) for g in gradients)
    else:
        assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
        assert (gradients[1].norm() == 0) == (case == "all-idle")

    start = load_file(theirs / "student" / "model.safetensors")
    assert sorted(student(ours)) == sorted(student(theirs)) == sorted(start)
    moved = flat(student(theirs)) - flat(start)
    assert (moved.norm() == 0) == (case == "all-idle")
    assert (flat(student(ours)) - flat(student(theirs))).norm() <= 1e-5 * moved.norm()

    rows = [list(csv.DictReader((f / "run" / "metrics.csv").open())) for f in (ours, theirs)]
    for name in ("train/reward", "train/completion_length", "train/skipped_updates", "train/empty_updates"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]], name
    for name in ("train/loss", "train/grad_norm"):
        table = [[float(row[name] or "nan") for row in lines] for lines in rows]
        assert table[0] == pytest.approx(table[1], rel=1e-5, abs=1e-7, nan_ok=True), name
