"""Two ranks (DDP on gloo) train as one process does, also when a rank has nothing left to do."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import toy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def train(folder: Path, devices: int, case: str) -> dict[str, torch.Tensor]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.training.ranks", str(devices), case, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    loaded: dict[str, torch.Tensor] = torch.load(folder / f"{case}-{devices}.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("case", ["even", "idle-rank", "all-idle"])
def test_two_ranks_equal_one_process(case: str, tmp_path: Path) -> None:
    one, two = train(tmp_path, 1, case), train(tmp_path, 2, case)
    start = toy.scorer(0).state_dict()
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    gap = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert (moved.norm() == 0) == (case == "all-idle")
    assert gap.norm() <= 1e-5 * moved.norm()
    rows = [list(csv.DictReader((tmp_path / f"run-{n}" / "metrics.csv").open())) for n in (1, 2)]
    for name in ("train/loss", "train/reward", "train/completion_length", "train/grad_norm"):
        ours, theirs = ([float(row[name]) for row in table] for table in rows)
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-7), name
