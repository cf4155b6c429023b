"""The `vllm` sampler against the real engine, in this process, on the CPU: `tox -e vllm`."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

from distillkit.components import StudentInfo
from distillkit.errors import ConfigError, ModelError, RolloutError
from distillkit.samplers.vllm import VLLMSampler
from distillkit.scorer import StudentScorer
from distillkit.types import RolloutGroup, SampleRequest
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


class LosesTheAdapter(VLLMSampler):
    """A sampler that hands over the base weights of a LoRA student only."""

    def sync(self, student: StudentScorer) -> None:
        super().sync(StudentScorer(copy.deepcopy(student.model).unload(), vocab_limit=student.vocab_limit))


class SamplesWarmer(VLLMSampler):
    """A sampler whose engine draws at another temperature than the requests ask for."""

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        given = {request.group_id: request for request in requests}
        for group in super().sample([replace(r, settings=replace(r.settings, temperature=1.6)) for r in requests]):
            yield replace(group, request=given[group.request.group_id])


@pytest.mark.parametrize(
    ("cls", "kind", "caught_at"),
    [
        (VLLMSampler, "embedded", None),
        (VLLMSampler, "lora", None),
        (SyncsOnce, "embedded", 2),
        (LosesTheAdapter, "lora", 1),
        (SamplesWarmer, "embedded", 1),
    ],
)
def test_a_sync_that_is_broken_is_caught_at_the_next_step(
    cls: type[VLLMSampler], kind: str, caught_at: int | None, info: StudentInfo
) -> None:
    sampler = cls(max_new_tokens=24, kv_cache_gib=0.25, enforce_eager=True, max_engine_gap=1e-3)
    try:
        shared.check_the_guard(sampler, student(kind, info), info, caught_at)
    finally:
        sampler.teardown()


def test_sleep_without_a_gpu_is_refused(info: StudentInfo) -> None:
    with pytest.raises(ConfigError, match=r"model.sampler.sleep: an engine on the CPU cannot sleep"):
        VLLMSampler(sleep=True).setup(info)


RANK = """
import torch
from dataclasses import replace
from distillkit.types import RolloutGroup, SampleRequest
from tests.engines import shared
from tests.engines.shared import gap, in_order, move, requests
from distillkit.samplers.vllm import VLLMSampler
torch.distributed.init_process_group("gloo")
rank, info = torch.distributed.get_rank(), shared.student_info()
scorer = shared.student("embedded", info)
sampler = VLLMSampler(max_new_tokens=24, kv_cache_gib=0.25, enforce_eager=True)
sampler.setup(info)
mine = [replace(request, seed=request.seed + (rank << 20)) for request in requests(info)][rank:]
drawn = []
for _ in range(3):
    sampler.sync(scorer)
    groups = in_order(sampler.sample(mine))
    assert gap(scorer, groups) < 1e-5, gap(scorer, groups)
    drawn.append([r.completion_ids.tolist() for group in groups[-3:] for r in group.rollouts])
    move(scorer, steps=1)
both = [None, None]
torch.distributed.all_gather_object(both, drawn[0])
assert both[0] != both[1], "the ranks repeat each other"
sampler.teardown()
count = torch.ones(1)
torch.distributed.all_reduce(count)  # the trainer's group is still there
assert count == 2
torch.distributed.destroy_process_group()
print("fine", flush=True)
"""


def test_two_ranks_have_an_engine_each() -> None:
    shared.run_two_ranks(RANK)


def test_a_prompt_that_leaves_too_few_positions_is_refused(
    pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo
) -> None:
    sampler, _ = pair
    long = replace(requests(info)[0], prompt_ids=tuple(range(4, 24)) * 12)
    with pytest.raises(RolloutError, match=r"240 prompt tokens \+ 24 new ones = 264\n    expected: at most 256"):
        sampler.sample([long])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kv_cache_gib": 2.0**20}, "memory"),
        ({"kv_cache_gib": 2.0**-16}, "cache"),
        ({"max_model_len": 100_000}, "max_model_len"),
    ],
)
def test_an_engine_that_cannot_start_says_why_and_leaves_room_for_one_that_can(
    settings: dict[str, Any], text: str, info: StudentInfo
) -> None:
    scorer, small = student("embedded", info), {"max_new_tokens": 24, "kv_cache_gib": 0.25, "enforce_eager": True}
    for wrong in ({**small, **settings}, small):
        sampler = VLLMSampler(**wrong)
        sampler.setup(info)
        try:
            if wrong is small:
                sampler.sync(scorer)
                assert shared.gap(scorer, shared.in_order(sampler.sample(requests(info)))) < 1e-5
                continue
            with pytest.raises(ModelError) as caught:
                sampler.sync(scorer)
            said = str(caught.value)
            assert said.startswith("model.sampler: vLLM cannot run Qwen3ForCausalLM with these settings\n    got:")
            assert text in said and "try:      model.sampler.kv_cache_gib, max_model_len" in said
        finally:
            sampler.teardown()


def test_an_engine_that_runs_out_of_memory_says_so(
    pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, scorer = pair
    engine = sampler._engine._llm.llm_engine
    model = engine.model_executor.driver_worker.worker.model_runner

    def too_large(*_: Any, **__: Any) -> Any:
        return torch.empty(2**62, dtype=torch.uint8)  # what a kernel's buffer would do

    with monkeypatch.context() as patch:
        patch.setattr(model, "execute_model", too_large)
        with pytest.raises(RolloutError) as caught:
            list(sampler.sample(requests(info)))
    assert "model.sampler: the vLLM engine failed while it sampled\n    got:      RuntimeError: " in str(caught.value)
    assert shared.gap(scorer, shared.in_order(sampler.sample(requests(info)))) < 1e-5, "nor is the engine lost"
    assert "allocate" in str(caught.value) and "model.sampler.kv_cache_gib" in str(caught.value)


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
