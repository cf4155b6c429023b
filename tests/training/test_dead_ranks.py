"""A rank that dies or fails ends the run on all ranks, with the reason; the last checkpoint is whole and continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.test_strategies import ARGUMENTS, metrics, on_ranks, run

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
QUICK = [*ARGUMENTS, "--model.validate_at_start", "false"]


@pytest.mark.parametrize(
    ("strategy", "phase", "call", "rank", "how", "launcher"),
    [
        ("ddp", "rollout", 2, 1, "alone", ()),
        ("ddp", "update", 2, 0, "raised", ()),
        ("ddp", "checkpoint", 2, 0, "killed", TORCHRUN),
        ("fsdp2", "saving", 2, 1, "killed", ()),
        ("deepspeed_stage_2", "optimizer", 2, 1, "raised", TORCHRUN),
        ("deepspeed_stage_3", "rollout", 2, 0, "killed", ()),
    ],
)
def test_all_ranks_end_with_the_reason_and_the_run_goes_on(
    strategy: str, phase: str, call: int, rank: int, how: str, launcher: tuple[str, ...], tmp_path: Path
) -> None:
    ranks = on_ranks(strategy, 2)
    ended = run(tmp_path, *launcher, "-m", "tests.training.killer", phase, str(call), str(rank), how, *QUICK, *ranks)
    assert ended.returncode not in (0, 2), ended.stdout[-3000:]
    assert f"TrainingStopped: rank {rank} on " in ended.stderr, ended.stderr[-5000:]
    said = f"OSError: no space left in {phase}" if how == "raised" else "no word from it: killed"
    assert f"got:      {said}" in ended.stderr
    folder = tmp_path / "runs" / "quickstart"
    status = json.loads((folder / "status.json").read_text())
    if rank == 1:
        assert status["state"] == "failed" and status["reason"].startswith("TrainingStopped: rank 1 on ")
    else:
        assert (status["state"], status["reason"]) == (("failed", said) if how == "raised" else ("running", ""))

    if phase not in ("checkpoint", "saving"):
        return  # what test_strategies.py continues after a kill
    assert "--ckpt_path last goes on from" in ended.stderr
    again = run(tmp_path, "-m", "distillkit", *QUICK, *ranks, "--ckpt_path", "last")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-5000:]
    assert "continuing runs/quickstart" in again.stdout
    assert [row["step"] for row in metrics(folder) if row["train/reward"]] == ["1", "2", "3"]
