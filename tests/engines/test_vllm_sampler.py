"""The `vllm` sampler against the real engine, in this process, on the CPU: `tox -e vllm`."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.components import StudentInfo
from distillkit.divergences.sampled import K2
from distillkit.errors import RolloutError, TrainingStopped
from distillkit.models import StudentScorer
from distillkit.refusals import StepParts
from distillkit.samplers.vllm import VLLMSampler
from distillkit.step import DistillationStep
from distillkit.teachers.local import LocalTeacher
from distillkit.update import StepSettings
from tests.engines import shared
from tests.engines.shared import requests, student


@pytest.fixture(scope="module")
def info() -> StudentInfo:
    return shared.student_info()


@pytest.fixture(scope="module", params=["embedded", "tied and padded", "lora"])
def pair(request: pytest.FixtureRequest, info: StudentInfo) -> Iterator[tuple[VLLMSampler, StudentScorer]]:
    scorer = student(request.param, info)
    sampler = VLLMSampler(max_new_tokens=24, kv_cache_gib=0.25, enforce_eager=True)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    sampler.setup(info)
    sampler.sync(scorer)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    yield sampler, scorer
    sampler.teardown()


@pytest.mark.parametrize("check", shared.CHECKS, ids=lambda check: check.__name__.removeprefix("check_that_"))
def test_the_engine_has_the_weights_and_draws_from_them(
    pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo, check: Callable[..., None]
) -> None:
    check(*pair, info)


class SyncsOnce(VLLMSampler):
    """A sampler whose weights stay those of the first step."""

    def sync(self, student: StudentScorer) -> None:
        if self._engine is None:
            super().sync(student)


@pytest.mark.parametrize(("cls", "broken"), [(VLLMSampler, False), (SyncsOnce, True)])
def test_a_sync_that_is_broken_is_caught_at_the_next_step(
    cls: type[VLLMSampler], broken: bool, info: StudentInfo
) -> None:
    scorer = student("embedded", info)
    teacher = LocalTeacher(path="embedded:teacher")
    sampler = cls(max_new_tokens=24, kv_cache_gib=0.25, enforce_eager=True, max_engine_gap=1e-3)
    for part in (teacher, sampler):
        part.setup(info)
    parts = StepParts(sampler=sampler, teacher=teacher, divergence=K2(), beta=Constant(value=1.0))
    step = DistillationStep(parts, StepSettings(), scorer, info)
    backend = LocalBackend(scorer, torch.optim.AdamW(scorer.parameters(), lr=1e-3))
    try:
        assert step.run(requests(info), step=0, backend=backend).metrics["train/engine_gap"] < 1e-5
        if broken:
            weights = copy.deepcopy(scorer.state_dict())
            with pytest.raises(TrainingStopped, match="step 2: the engine that sampled and the trainer disagree"):
                step.run(requests(info), step=1, backend=backend)
            assert all(torch.equal(value, weights[name]) for name, value in scorer.state_dict().items())
        else:
            assert step.run(requests(info), step=1, backend=backend).metrics["train/engine_gap"] < 1e-5
    finally:
        sampler.teardown()


def test_a_prompt_that_leaves_too_few_positions_is_refused(
    pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo
) -> None:
    sampler, _ = pair
    long = replace(requests(info)[0], prompt_ids=tuple(range(4, 24)) * 12)
    with pytest.raises(RolloutError, match=r"240 prompt tokens \+ 24 new ones = 264\n    expected: at most 256"):
        sampler.sample([long])


def test_the_quickstart_runs_with_vllm(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["fit", "--config", "quickstart", "--model.sampler", "vllm", "--model.sampler.enforce_eager", "true"]
    options = ["--run_dir", str(run), "--trainer.max_steps", "3", "--data.val.0.source.limit", "50"]
    done = subprocess.run(
        [sys.executable, "-m", "distillkit", *command, *options], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train/engine_gap"]]
    assert len(rows) == 3 and all(float(row["train/engine_gap"]) < 1e-5 for row in rows)
    assert (run / "student" / "model.safetensors").is_file()
