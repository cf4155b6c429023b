"""Five problems on two real ranks (gloo) give what one rank gives: metrics, and the file to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed
import torch.multiprocessing

from distillkit.data import EvalBatches
from distillkit.evaluation import EvalMetrics, evaluate_batch, gather_results, write_results
from tests.evaluation.fake_parts import DigitReward, DigitSampler, eval_set, problems, student_info


def run(folder: Path, count: int, rank: int, world_size: int) -> dict[str, float]:
    """Evaluate this rank's share, write the file on rank 0, and return the metrics."""
    chosen = eval_set()
    metrics = EvalMetrics(chosen.name, k=chosen.k, ks=chosen.pass_ks)
    results = []
    for batch in EvalBatches(problems(count), chosen, rank=rank, world_size=world_size):
        judged = evaluate_batch(
            batch, sampler=DigitSampler(), rewards=[DigitReward()], student_info=student_info(), seed=3
        )
        metrics.update(judged)
        results += judged
    gathered = gather_results(results)
    if rank == 0:
        write_results(folder / f"{world_size}.jsonl", gathered, step=4)
    return {name: float(value) for name, value in metrics.compute().items()}


def worker(rank: int, folder: Path, world_size: int, counts: tuple[int, ...]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for count in counts:
        part = folder / str(count)
        part.mkdir(exist_ok=True)
        (part / f"{rank}.json").write_text(json.dumps(run(part, count, rank, world_size)))
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    counts = (5, 1, 4)
    torch.multiprocessing.spawn(worker, args=(tmp_path, 2, counts), nprocs=2)
    for count in counts:
        part = tmp_path / str(count)
        alone = run(part, count, 0, 1)
        first, second = (json.loads((part / f"{rank}.json").read_text()) for rank in range(2))
        assert first == pytest.approx(alone, rel=0, abs=0, nan_ok=True)
        assert second == pytest.approx(alone, rel=0, abs=0, nan_ok=True)
        assert (part / "2.jsonl").read_bytes() == (part / "1.jsonl").read_bytes()
    alone = run(tmp_path / "5", 5, 0, 1)
    # The five problems tell counting twice apart: with problem 0 a second time the means would be other numbers.
    assert len((tmp_path / "5" / "2.jsonl").read_text().splitlines()) == 5
    twice = EvalMetrics("five", k=4, ks=(1, 2, 4))
    for i, batch in enumerate([*EvalBatches(problems(5), eval_set()), *EvalBatches(problems(1), eval_set())]):
        judged = evaluate_batch(
            batch, sampler=DigitSampler(), rewards=[DigitReward()], student_info=student_info(), seed=3
        )
        twice.update([type(r)(**{**vars(r), "index": r.index + 100 * (i // 3)}) for r in judged])
    assert float(twice.compute()["val/five/mean@4"]) != alone["val/five/mean@4"]
