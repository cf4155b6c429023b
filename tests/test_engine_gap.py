"""The gap between the engine that sampled and the trainer: measured, and a reason to stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.components import RolloutSampler
from distillkit.divergences.sampled import K2
from distillkit.errors import TrainingStopped
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.step import DistillationStep
from distillkit.types import StepOutput
from tests import toy
from tests.test_scorer import local_teacher

PROMPTS = [[2, 3, 4], [5, 6]]


class OtherEngine(toy.RandomSampler):
    """Reports the log-probs of the student, each moved by `off` nats; every third token's are unknown."""

    same_engine = False

    def __init__(self, off: float, limit: float | None, **arguments: Any) -> None:
        super().__init__(group_size=4, max_new_tokens=8, **arguments)
        self.off = off
        self.max_engine_gap = limit

    def sample(self, requests: Any) -> Any:
        for group in super().sample(requests):
            rollouts = []
            for rollout in group.rollouts:
                ids = torch.cat([torch.tensor(group.request.prompt_ids), rollout.completion_ids])[None]
                with torch.no_grad():
                    logits = toy.model(0)(input_ids=ids).logits[0, :, : len(toy.VOCABULARY)]
                own = logits.log_softmax(-1)[len(group.request.prompt_ids) - 1 : -1]
                told = own.gather(-1, rollout.completion_ids[:, None])[:, 0] + self.off
                told[2::3] = float("nan")
                rollouts.append(replace(rollout, behaviour_logprobs=told))
            yield replace(group, rollouts=tuple(rollouts))


def run(sampler: RolloutSampler, **settings: Any) -> tuple[StepOutput, DistillationStep]:
    parts = StepParts(sampler=sampler, teacher=local_teacher(toy.model(1)), divergence=K2(), beta=Constant(value=1.0))
    step = DistillationStep(parts, StepSettings(tokens_per_micro_batch=40, **settings), toy.scorer(0), toy.info())
    backend = LocalBackend(step.scorer, torch.optim.SGD(step.scorer.parameters(), lr=0.5))
    return step.run(toy.requests(PROMPTS), step=6, backend=backend), step


@pytest.mark.parametrize("settings", [{}, {"minibatches": 2}, {"inner_epochs": 2}])
@pytest.mark.parametrize("off", [0.0, 0.25, -0.25])
def test_the_gap_is_that_of_the_weights_that_sampled(off: float, settings: dict[str, int]) -> None:
    output, _ = run(OtherEngine(off, None), **settings)
    assert output.metrics["train/engine_gap"] == pytest.approx(abs(off), abs=1e-5)


def test_above_the_limit_the_run_stops_before_the_update() -> None:
    assert run(OtherEngine(0.25, 0.3))[0].updates == 1
    sampler = OtherEngine(0.25, 0.2)
    known = sum(n - len(range(2, n, 3)) for n in toy.batch(PROMPTS).completion_lengths.tolist())
    with pytest.raises(TrainingStopped) as stopped:
        run(sampler)
    assert str(stopped.value) == (
        "step 7: the engine that sampled and the trainer disagree about the sampled tokens\n"
        f"    got:      0.25 nats/token on average, over {known} tokens\n"
        "    expected: at most 0.2 (model.sampler.max_engine_gap)\n"
        "    try:      stale weights or another temperature in the engine? distillkit never uses these rollouts"
    )


def test_a_gap_that_is_no_number_is_above_every_limit() -> None:
    with pytest.raises(TrainingStopped, match="got:      inf nats/token"):
        run(OtherEngine(float("inf"), 0.2))


def test_a_sampler_with_the_trainers_weights_has_none() -> None:
    assert "train/engine_gap" not in run(toy.RandomSampler(group_size=4, max_new_tokens=8))[0].metrics
