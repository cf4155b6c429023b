"""metrics.csv: complete after a kill, one row a step, and the same after a resume as without one."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from distillkit.errors import ContractError, DataError
from distillkit.reporting.metrics import MetricsCSV, MetricsRow, read_metrics, summarize_metric


def test_train_and_validation_metrics_of_a_step_share_a_row_and_columns_grow(tmp_path: Path) -> None:
    logger = MetricsCSV(folder=tmp_path)
    logger.log_metrics({"train/reward": 0.5, "epoch": 0}, step=1)
    logger.log_metrics({"train/reward": torch.tensor(0.1), "epoch": 0}, step=2)
    logger.log_metrics({"val/a,b/pass@1": 0.25}, step=2)
    logger.log_metrics({"train/reward": 0.75, "time/step": None}, step=3)
    logger.log_metrics({"val/a,b/pass@1": math.nan, "train/reward": 1}, step=3)
    assert (tmp_path / "metrics.csv").read_text() == (
        'step,train/reward,epoch,"val/a,b/pass@1"\n1,0.5,0,\n2,0.1,0,0.25\n3,1,,nan\n'
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv"]


def test_values_come_back_exactly(tmp_path: Path) -> None:
    single = torch.tensor([0.1, 1 / 3, 1e-30, 123456.789, -2.5], dtype=torch.float32)
    values = {f"f32/{i}": v for i, v in enumerate(single)}
    double = {"f64/pi": math.pi, "f64/large": 1e300, "whole": 12, "inf": math.inf, "minus": -math.inf, "nan": math.nan}
    MetricsCSV(folder=tmp_path).log_metrics({**values, **double, "none": None}, step=0)
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert torch.equal(torch.tensor([row.values[f"f32/{i}"] for i in range(5)], dtype=torch.float32), single)
    assert math.isnan(row.values["nan"]) and "none" not in row.values
    assert {k: row.values[k] for k in double if k != "nan"} == {k: v for k, v in double.items() if k != "nan"}


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    MetricsCSV(folder=tmp_path).log_metrics({"a": 1.0}, step=1)
    again = MetricsCSV(folder=tmp_path)
    again.log_metrics({"a": 2.0}, step=2)
    again.log_metrics({"b": 3.0}, step=2)
    MetricsCSV(folder=tmp_path).log_metrics({"a": 5.0})
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,1.0,\n2,2.0,3.0\n3,5.0,\n"


def test_a_step_logged_late_takes_its_place(tmp_path: Path) -> None:
    logger = MetricsCSV(folder=tmp_path)
    for step in (1, 4, 2, 4, 1, 5):
        logger.log_metrics({"a": step * 10}, step=step)
    logger.log_metrics({"b": 7}, step=2)
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,10,\n2,20,7\n4,40,\n5,50,\n"


@pytest.mark.parametrize("last", ["append", "merge"])
def test_a_last_line_cut_at_any_byte_loses_nothing_else(tmp_path: Path, last: str) -> None:
    def log(logger: MetricsCSV, steps: list[int]) -> None:
        for step in steps:
            logger.log_metrics({"train/reward": step / 7, "train/divergence": 0.25 * step}, step=step)
            if last == "merge" and step == 3:
                logger.log_metrics({"train/divergence": 9.0}, step=step)

    log(MetricsCSV(folder=tmp_path), [1, 2, 3])
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    assert len(whole) - start > 10
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert [row.step for row in read_metrics(path)] == [1, 2]
        log(MetricsCSV(folder=tmp_path), [3])
        assert path.read_bytes() == whole


def test_nothing_that_was_logged_is_lost_to_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from distillkit.reporting.metrics import MetricsCSV\n"
        "logger = MetricsCSV(folder=sys.argv[1])\n"
        "for step in range(1, 10**6):\n"
        "    logger.log_metrics({'train/reward': step / 3}, step=step)\n"
        "    if step % 5 == 0: logger.log_metrics({f'val/{step // 20}': step / 7}, step=step)\n"
        "    print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 57:
                process.send_signal(signal.SIGKILL)
                break
        acknowledged = [57, *map(int, process.stdout.read().split())][-1]
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row.step for row in rows] in (
        list(range(1, acknowledged + 1)),
        list(range(1, acknowledged + 2)),  # written, and killed before it said so
    )
    assert all(row.values["train/reward"] == pytest.approx(row.step / 3) for row in rows)
    assert rows[54].values["val/2"] == pytest.approx(55 / 7)
    MetricsCSV(folder=tmp_path).log_metrics({"train/reward": 0.5})
    assert read_metrics(tmp_path / "metrics.csv")[: len(rows)] == rows


def test_a_write_that_fails_is_repaired_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSV(folder=tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)

    def full(descriptor: int) -> None:
        os.truncate(logger.path, logger.path.stat().st_size - 2)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            logger.log_metrics({"a": 2.5}, step=2)
    assert logger.path.read_text() == "step,a\n1,1.0\n2,2."
    logger.log_metrics({"a": 3.0}, step=3)
    assert logger.path.read_text() == "step,a\n1,1.0\n3,3.0\n"


def test_rewind_and_the_same_steps_again_give_the_same_file(tmp_path: Path) -> None:
    logger = MetricsCSV(folder=tmp_path)

    def log(first: int, last: int, into: MetricsCSV) -> None:
        for step in range(first, last + 1):
            into.log_metrics({"train/reward": step / 3}, step=step)
            if step % 2 == 0:
                into.log_metrics({"val/held_out/pass@1": step / 10}, step=step)

    log(1, 7, logger)
    before = logger.path.read_bytes()
    resumed = MetricsCSV(folder=tmp_path)
    assert resumed.rewind(4) == 3
    assert [row.step for row in read_metrics(logger.path)] == [1, 2, 3, 4]
    assert [row.step for row in read_metrics(tmp_path / "metrics.rewound-1.csv")] == [5, 6, 7]
    log(5, 7, resumed)
    assert logger.path.read_bytes() == before

    assert resumed.rewind(7) == 0 and logger.path.read_bytes() == before
    assert resumed.rewind(0) == 7 and read_metrics(logger.path) == ()
    assert [row.step for row in read_metrics(tmp_path / "metrics.rewound-2.csv")] == list(range(1, 8))
    log(1, 7, resumed)
    assert logger.path.read_bytes() == before


def test_rewind_after_a_kill_in_mid_line_and_without_a_file(tmp_path: Path) -> None:
    logger = MetricsCSV(folder=tmp_path)
    assert logger.rewind(3) == 0 and not logger.path.exists()
    logger.path.write_text("step,a\n1,1.0\n2,2.0\n3,3.")
    assert logger.rewind(1) == 1
    logger.log_metrics({"a": 4.0}, step=2)
    assert logger.path.read_text() == "step,a\n1,1.0\n2,4.0\n"


def test_a_kill_during_rewind_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSV(folder=tmp_path)
    for step in (1, 2, 3):
        logger.log_metrics({"a": step}, step=step)
    old = logger.path.read_bytes()

    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, kill)
            with pytest.raises(Killed):
                logger.rewind(1)
        assert logger.path.read_bytes() == old
    assert MetricsCSV(folder=tmp_path).rewind(1) == 2


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSV(folder=tmp_path / "run")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"a": 1.0}, step=1)
    assert logger.rewind(0) is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,a\n0,1\n", ":1: not a header\n    got:      epoch,a\n"),
        ("hello", ":1: not a header\n    got:      hello\n"),
        ("step,a,a\n", ":1: not a header\n    got:      step,a,a\n"),
        ("step,a\n1,2\nx,3\n", ":3: not a row\n    got:      x,3\n    expected: 2 cells, the step after 1\n"),
        ("step,a\n1,2,3\n", ":2: not a row\n    got:      1,2,3\n    expected: 2 cells\n"),
        ("step,a\n2,2\n2,3\n", ":3: not a row\n    got:      2,3\n    expected: 2 cells, the step after 2\n"),
    ],
)
def test_a_file_that_is_no_metrics_file_is_refused_and_kept(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    for use in (lambda: MetricsCSV(folder=tmp_path).log_metrics({"a": 1.0}, step=9), lambda: read_metrics(path)):
        with pytest.raises(DataError) as caught:
            use()
        assert str(caught.value).startswith(f"{path}{message}")
        assert path.read_text() == text


def test_the_whole_text_of_the_errors(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with pytest.raises(DataError) as caught:
        read_metrics(path)
    assert str(caught.value) == f"{path}: no such file\n    expected: the metrics.csv of a run folder"
    path.write_text("reward\n1\n")
    with pytest.raises(DataError) as caught:
        read_metrics(path)
    assert str(caught.value) == (
        f"{path}:1: not a header\n    got:      reward\n    expected: step,<metric>,... each name once\n"
        "    try:      give the run another folder, or move this file away"
    )
    path.write_text("step,a\n1,x\n")
    with pytest.raises(DataError) as caught:
        read_metrics(path)
    assert str(caught.value) == f"{path}: step 1, a\n    got:      x\n    expected: a number"
    path.unlink()
    with pytest.raises(ContractError) as contract:
        MetricsCSV(folder=tmp_path).log_metrics({"a": "high"}, step=1)
    assert str(contract.value) == (
        "metrics.csv: a metric that cannot be written\n    got:      'a': 'high'\n    expected: name: number"
    )
    with pytest.raises(ContractError, match="at least 0"):
        MetricsCSV(folder=tmp_path).log_metrics({"a": 1.0}, step=-1)
    assert not path.exists()


def test_summary_of_a_metric() -> None:
    values = [{"a": 0.43}, {}, {"a": 0.8}, {"a": math.nan}, {"a": 0.8}, {"a": 0.79}]
    rows = [MetricsRow(step=step, values=value) for step, value in enumerate(values)]
    best = summarize_metric(rows, "a")
    assert best is not None
    assert (best.first, best.first_step, best.last, best.last_step) == (0.43, 0, 0.79, 5)
    assert (best.best, best.best_step) == (0.8, 2)
    lowest = summarize_metric(rows, "a", mode="min")
    assert lowest is not None and (lowest.best, lowest.best_step) == (0.43, 0)
    assert summarize_metric(rows, "b") is None


def test_lightning_finds_the_run_folder(tmp_path: Path) -> None:
    logger = MetricsCSV(folder=tmp_path)
    assert (logger.save_dir, logger.log_dir, logger.root_dir) == (str(tmp_path),) * 3
    assert (logger.name, logger.version) == ("", "")
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []
