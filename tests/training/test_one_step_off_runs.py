"""Whole runs that sample one step ahead: continued, validated in between, on two ranks, and ended by an error."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from distillkit import DataSource, LocalTeacher, OnPolicyDistillation, PromptData
from distillkit.data import EvalSet
from distillkit.divergences.sampled import K2
from distillkit.errors import RolloutError
from distillkit.runs import make_trainer
from distillkit.types import RolloutGroup, SampleRequest
from tests import toy
from tests.test_one_step_off import Hanging, OwnWeights
from tests.training.test_resume import differences, metrics, without_paths

ROOT = Path(__file__).parents[2]
STEPS = 5


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs()


def write_inputs() -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        toy.model(seed).save_pretrained(name)
        toy.tokenizer().save_pretrained(name)
    rows = [{"prompt": f"{i}+{i}="} for i in range(10)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Keep(Callback):
    """Keeps a copy of the run's folder as it is after one step."""

    def __init__(self, step: int, at: str) -> None:
        self.step, self.at = step, at

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.rollout_step == self.step:
            shutil.copytree(trainer.default_root_dir, self.at)


def fit(
    folder: str,
    *,
    sampler: OwnWeights | None = None,
    callbacks: Sequence[Callback] = (),
    ckpt: str | None = None,
    steps: int = STEPS,
    **more: Any,
) -> None:
    pl.seed_everything(1)
    module = OnPolicyDistillation(
        student="./student",
        sampler=sampler or OwnWeights(group_size=2, max_new_tokens=8),
        teacher=LocalTeacher(path="./teacher"),
        divergence=K2(),
        beta=1.0,
        one_step_off=True,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    source = DataSource(path="rows.jsonl")
    settings = {"val_check_interval": 2, "checkpoint_every": 1, "enable_progress_bar": False, "devices": 1, **more}
    trainer = make_trainer(folder, max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **settings)
    data = PromptData(train=source, val=[EvalSet(name="val", source=source)], prompts_per_step=4)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)


def column(folder: str, name: str) -> list[float]:
    with Path(folder, "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_run_continued_from_any_step_is_the_unbroken_one(stopped: int) -> None:
    fit("whole", callbacks=[Keep(stopped, "killed")])
    assert column("whole", "train/staleness") == [0.0] + [1.0] * (STEPS - 1)
    saved = torch.load("killed/checkpoints/last.ckpt", weights_only=True)["distillkit"]
    assert saved["rollout_step"] == stopped and len(saved["step"]["ahead"]) == 4
    fit("again", ckpt="killed/checkpoints/last.ckpt")
    ours, theirs = (torch.load(f"{f}/checkpoints/last.ckpt", weights_only=True) for f in ("again", "whole"))
    assert differences(without_paths(ours), without_paths(theirs)) == []
    assert metrics(Path("again"))[-1] == metrics(Path("whole"))[-1]
    assert column("again", "train/staleness") == [1.0] * (STEPS - stopped)


class FailsLater(OwnWeights):
    """Fails to sample the rollouts of the third step, before or after the probe of the second is answered."""

    def __init__(self, answered: bool) -> None:
        super().__init__(group_size=2, max_new_tokens=8)
        self.answered, self.calls = answered, 0

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        self.calls += any(request.group_id < 0 for request in requests)
        if self.calls < 2:
            yield from super().sample(requests)
            return
        yield from super().sample(requests[: int(self.answered)])
        raise RolloutError("the server is gone")


@pytest.mark.parametrize("answered", [False, True])
def test_when_sampling_fails_what_was_learned_before_is_kept(answered: bool) -> None:
    """Without an answer to the probe, nobody knows that the engine is right: there is no second update then."""
    with pytest.raises(RolloutError, match="the server is gone"):
        fit("run", sampler=FailsLater(answered), val_check_interval=100)
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["distillkit"]
    assert saved["rollout_step"] == 1 + answered and bool(saved["step"]["ahead"]) is not answered
    fit("again", ckpt="run/checkpoints/last.ckpt")
    assert column("again", "train/staleness") == ([0.0, 1.0, 1.0] if answered else [1.0] * 4)


class Breaks(Callback):
    """An error after the first step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        raise KeyboardInterrupt if self.interrupt else ValueError("a disk is full")

    def __init__(self, interrupt: bool) -> None:
        self.interrupt = interrupt


@pytest.mark.parametrize("interrupt", [False, True])
def test_an_error_ends_the_sampling_beside_it_and_every_part(interrupt: bool) -> None:
    sampler, torn = Hanging(), []
    sampler.teardown = lambda: torn.append(True)  # type: ignore[method-assign]
    with pytest.raises(SystemExit if interrupt else ValueError):
        fit("run", sampler=sampler, callbacks=[Breaks(interrupt)], checkpoint_every=100, limit_val_batches=0)
    assert sampler.left.is_set() and torn == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts-ahead")]


RANK = """
import os, sys
from tests.training.test_one_step_off_runs import fit
fit(sys.argv[1], strategy=sys.argv[2], devices=int(os.environ.get("WORLD_SIZE", 1)))
"""


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    for strategy, ranks in (("auto", 1), ("ddp", 2)):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        Path("rank.py").write_text(RANK)
        command = [sys.executable, *(launcher if ranks > 1 else []), "rank.py", f"ranks-{ranks}", strategy]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in ("train/staleness", "train/divergence", "train/staleness_gap", "train/grad_norm"):
        assert column("ranks-2", name) == pytest.approx(column("ranks-1", name), rel=1e-3)
    ours, theirs = (load_file(f"ranks-{n}/student/model.safetensors") for n in (2, 1))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in theirs)
