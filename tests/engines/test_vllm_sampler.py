"""The `vllm` sampler against the real engine, in this process, on the CPU: `tox -e vllm`."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tox -e vllm")

from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.components import StudentInfo
from distillkit.divergences.sampled import K2
from distillkit.errors import RolloutError, TrainingStopped
from distillkit.models import ScorePlan, StudentScorer, load_causal_lm, load_tokenizer
from distillkit.refusals import StepParts
from distillkit.samplers.hf import HFSampler
from distillkit.samplers.vllm import VLLMSampler
from distillkit.step import DistillationStep
from distillkit.teachers.local import LocalTeacher
from distillkit.types import RolloutBatch, RolloutGroup, SampleRequest, SamplingSettings
from distillkit.update import StepSettings

PROMPTS = ["8*9+7>", "1+2*3-4>", "5-6>", "3+4*5-6+7>"]


@pytest.fixture(scope="module")
def info() -> StudentInfo:
    tokenizer = load_tokenizer("embedded:student", where="student")
    return StudentInfo(
        tokenizer=tokenizer,
        vocab_limit=len(tokenizer),
        eos_token_ids=(int(tokenizer.eos_token_id),),
        pad_token_id=int(tokenizer.pad_token_id),
        device=torch.device("cpu"),
    )


def student(kind: str, info: StudentInfo) -> StudentScorer:
    """The embedded student, or a random one whose head is its embedding and has rows beyond the shared vocabulary."""
    model: Any = load_causal_lm("embedded:student", where="student", dtype="float32")
    if kind == "tied and padded":
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings, config.vocab_size = True, info.vocab_limit + 29
        torch.manual_seed(0)
        model = type(model)(config)
    return StudentScorer(model, vocab_limit=info.vocab_limit)


def requests(info: StudentInfo, *, temperature: float = 1.0, group_size: int = 8) -> list[SampleRequest]:
    settings = SamplingSettings(group_size=group_size, max_new_tokens=24, temperature=temperature)
    return [
        SampleRequest(
            prompt_ids=tuple(info.tokenizer(prompt)["input_ids"]),
            prompt=prompt,
            row={},
            group_id=10 - i,
            seed=(i + 1) << 58,
            settings=settings,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def in_order(groups: Iterator[RolloutGroup]) -> list[RolloutGroup]:
    return sorted(groups, key=lambda group: -group.request.group_id)


def gap(scorer: StudentScorer, groups: list[RolloutGroup], temperature: float = 1.0) -> float:
    """Mean |log π_trainer − log π_engine| in nats/token."""
    batch = RolloutBatch.from_groups(groups, pad_id=0)
    with torch.no_grad():
        scores = scorer(batch, ScorePlan(sampling_temperature=temperature, distil_temperature=1.0))
    return float((scores.logprobs - batch.behaviour_logprobs)[batch.loss_mask].abs().mean())


def move(scorer: StudentScorer, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(4, 40, (8, 16), generator=generator)
        optimizer.zero_grad()
        scorer.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module", params=["embedded", "tied and padded"])
def pair(request: pytest.FixtureRequest, info: StudentInfo) -> Iterator[tuple[VLLMSampler, StudentScorer]]:
    scorer = student(request.param, info)
    sampler = VLLMSampler(max_new_tokens=24, kv_cache_gib=0.25, enforce_eager=True)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    sampler.setup(info)
    sampler.sync(scorer)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    yield sampler, scorer
    sampler.teardown()


def test_groups_are_whole_and_end_where_they_should(pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo) -> None:
    sampler, _ = pair
    groups = in_order(sampler.sample(requests(info)))
    assert [group.request.prompt for group in groups] == PROMPTS
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        ids = rollout.completion_ids.tolist()
        assert max(ids) < info.vocab_limit
        assert not set(ids[:-1]) & set(info.eos_token_ids)
        assert (ids[-1] in info.eos_token_ids) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(ids) == 24
    assert {len(group.rollouts) for group in groups} == {8}


def test_draws_follow_the_seeds(pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo) -> None:
    sampler, _ = pair

    def drawn(wanted: list[SampleRequest]) -> list[list[int]]:
        return [r.completion_ids.tolist() for group in in_order(sampler.sample(wanted)) for r in group.rollouts]

    first = drawn(requests(info))
    assert first == drawn(requests(info))
    assert first != drawn([replace(request, seed=request.seed + 2**20) for request in requests(info)])
    assert len({tuple(ids) for ids in first}) > len(PROMPTS)


def test_after_updates_engine_and_trainer_agree_and_differ_from_before(
    pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo
) -> None:
    sampler, scorer = pair
    for temperature in (1.0, 0.7):
        before = in_order(sampler.sample(requests(info, temperature=temperature)))
        assert gap(scorer, before, temperature) < 1e-5
    before = in_order(sampler.sample(requests(info)))
    move(scorer)
    assert gap(scorer, in_order(sampler.sample(requests(info)))) > 1e-3, "the engine still has the old weights"
    sampler.sync(scorer)
    assert gap(scorer, in_order(sampler.sample(requests(info)))) < 1e-5
    assert gap(scorer, before) > 1e-3


def test_greedy_completions_are_those_of_the_hf_sampler(
    pair: tuple[VLLMSampler, StudentScorer], info: StudentInfo
) -> None:
    sampler, scorer = pair
    plain = HFSampler(max_new_tokens=24)
    plain.setup(info)
    plain.sync(scorer)
    sampler.sync(scorer)
    greedy = requests(info, temperature=0.0, group_size=1)
    for ours, theirs in zip(in_order(sampler.sample(greedy)), in_order(plain.sample(greedy)), strict=True):
        mine, other = (group.rollouts[0].completion_ids for group in (ours, theirs))
        shared = min(len(mine), len(other))
        differing = (mine[:shared] != other[:shared]).nonzero()
        if len(differing) == 0:
            assert len(mine) == len(other)
            continue
        at = int(differing[0])
        prefix = torch.cat([torch.tensor(ours.request.prompt_ids), mine[:at]])[None]
        with torch.no_grad():
            best = scorer.model(input_ids=prefix).logits[0, -1, : info.vocab_limit].topk(2).values
        assert best[0] - best[1] < 1e-4, "they part where the choice is clear"


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
