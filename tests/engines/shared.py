"""What the tests of the vLLM samplers share."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.components import RolloutSampler, StudentInfo
from distillkit.divergences.sampled import K2
from distillkit.errors import TrainingStopped
from distillkit.models import load_causal_lm, load_tokenizer
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.samplers.hf import HFSampler
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.step import DistillationStep
from distillkit.teachers.local import LocalTeacher
from distillkit.types import RolloutBatch, RolloutGroup, SampleRequest, SamplingSettings

PROMPTS = ["8*9+7>", "1+2*3-4>", "5-6>", "3+4*5-6+7>"]


def student_info() -> StudentInfo:
    tokenizer = load_tokenizer("embedded:student", where="student")
    return StudentInfo(
        tokenizer=tokenizer,
        vocab_limit=len(tokenizer),
        eos_token_ids=(int(tokenizer.eos_token_id),),
        pad_token_id=int(tokenizer.pad_token_id),
        device=torch.device("cpu"),
    )


def student(kind: str, info: StudentInfo) -> StudentScorer:
    """The embedded student; a random one whose head is its embedding, with rows beyond the shared vocabulary; or LoRA.

    "lora" has adapters on some of the weights that an engine fuses (query and value of three, gate of two).
    """
    model: Any = load_causal_lm("embedded:student", where="student", dtype="float32")
    torch.manual_seed(0)
    if kind == "tied and padded":
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings, config.vocab_size = True, info.vocab_limit + 29
        model = type(model)(config)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "gate_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
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
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(4, 40, (8, 16), generator=generator)
        optimizer.zero_grad()
        scorer.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def check_that_groups_are_whole_and_end_where_they_should(
    sampler: RolloutSampler, scorer: StudentScorer, info: StudentInfo
) -> None:
    groups = in_order(sampler.sample(requests(info)))
    assert [group.request.prompt for group in groups] == PROMPTS
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        ids = rollout.completion_ids.tolist()
        assert max(ids) < info.vocab_limit
        assert not set(ids[:-1]) & set(info.eos_token_ids)
        assert (ids[-1] in info.eos_token_ids) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(ids) == 24
    assert {len(group.rollouts) for group in groups} == {8}


def check_that_draws_follow_the_seeds(sampler: RolloutSampler, scorer: StudentScorer, info: StudentInfo) -> None:
    def drawn(wanted: list[SampleRequest]) -> list[list[int]]:
        return [r.completion_ids.tolist() for group in in_order(sampler.sample(wanted)) for r in group.rollouts]

    first = drawn(requests(info))
    assert first == drawn(requests(info))
    assert first != drawn([replace(request, seed=request.seed + 2**20) for request in requests(info)])
    assert len({tuple(ids) for ids in first}) > len(PROMPTS)


def check_that_after_updates_engine_and_trainer_agree_and_differ_from_before(
    sampler: RolloutSampler, scorer: StudentScorer, info: StudentInfo
) -> None:
    for temperature in (1.0, 0.7):
        before = in_order(sampler.sample(requests(info, temperature=temperature)))
        assert gap(scorer, before, temperature) < 1e-5
    before = in_order(sampler.sample(requests(info)))
    move(scorer)
    assert gap(scorer, in_order(sampler.sample(requests(info)))) > 1e-3, "the engine still has the old weights"
    sampler.sync(scorer)
    assert gap(scorer, in_order(sampler.sample(requests(info)))) < 1e-5
    assert gap(scorer, before) > 1e-3


def check_that_greedy_completions_are_those_of_the_hf_sampler(
    sampler: RolloutSampler, scorer: StudentScorer, info: StudentInfo
) -> None:
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


def check_the_guard(sampler: RolloutSampler, scorer: StudentScorer, info: StudentInfo, caught_at: int | None) -> None:
    """Run two steps; the sampler's limit stops the one numbered `caught_at` before it changes a weight."""
    teacher = LocalTeacher(path="embedded:teacher")
    for part in (teacher, sampler):
        part.setup(info)
    parts = StepParts(sampler=sampler, teacher=teacher, divergence=K2(), beta=Constant(value=1.0))
    step = DistillationStep(parts, StepSettings(), scorer, info)
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    backend = LocalBackend(scorer, torch.optim.AdamW(trained, lr=1e-3))
    for i in range(2):
        if caught_at == i + 1:
            weights = copy.deepcopy(scorer.state_dict())
            expected = f"step {caught_at}: the engine that sampled and the trainer disagree"
            with pytest.raises(TrainingStopped, match=expected):
                step.run(requests(info), step=i, backend=backend)
            assert all(torch.equal(value, weights[name]) for name, value in scorer.state_dict().items())
            return
        assert step.run(requests(info), step=i, backend=backend).metrics["train/engine_gap"] < 1e-5
    assert caught_at is None


def run_two_ranks(script: str, **variables: str) -> None:
    """Run a script in two processes that can form a process group; each has to end with the word "fine"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {**os.environ, **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env={**place, "RANK": str(rank)}, **pipes) for rank in range(2)
    ]
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=250)
            assert rank.returncode == 0 and out.strip().endswith("fine"), err[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


CHECKS = [
    check_that_groups_are_whole_and_end_where_they_should,
    check_that_draws_follow_the_seeds,
    check_that_after_updates_engine_and_trainer_agree_and_differ_from_before,
    check_that_greedy_completions_are_those_of_the_hf_sampler,
]
