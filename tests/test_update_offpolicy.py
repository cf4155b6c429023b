"""Behaviour, old and current policy kept apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillkit.betas.constant import Constant
from distillkit.components import DivergenceEstimator, RewardFn
from distillkit.divergences.full import ReverseKL
from distillkit.divergences.sampled import K2
from distillkit.objectives.grpo import GRPO
from distillkit.prepared import StepSettings
from distillkit.types import RewardOutput, RolloutBatch, RolloutGroup, SampleRequest
from tests import toy
from tests.test_scorer import full_logits, local_teacher
from tests.test_step import EvenDigits, build, close, gradient


class Flat(RewardFn):
    """The same for every rollout: the objective has nothing to learn."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        return RewardOutput.single("flat", [1.0] * len(rollouts))


class ShiftedEngine(toy.RandomSampler):
    """Reports behaviour log-probs that are the trainer's, off by a constant number of nats."""

    same_engine = False

    def __init__(self, shift: float) -> None:
        super().__init__(group_size=4, max_new_tokens=8)
        self.shift = shift

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        batch = toy.batch([list(r.prompt_ids) for r in requests])
        logits = full_logits(toy.model(0), batch).detach()
        ids = batch.tokens[batch.loss_mask]
        exact = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].split(batch.loss_mask.sum(1).tolist())
        row = 0
        for group in super().sample(requests):
            rollouts = []
            for rollout in group.rollouts:
                rollouts.append(replace(rollout, behaviour_logprobs=exact[row] - self.shift))
                row += 1
            yield replace(group, rollouts=tuple(rollouts))


def test_policy_term_is_weighted_by_the_truncated_ratio_of_old_to_behaviour() -> None:
    plain = gradient(build(objective=GRPO(), rewards=[EvenDigits()]))[0]
    near = gradient(
        build(objective=GRPO(), rewards=[EvenDigits()], sampler=ShiftedEngine(torch.tensor(1.5).log().item()))
    )[0]
    far = gradient(build(objective=GRPO(), rewards=[EvenDigits()], sampler=ShiftedEngine(3.0)))[0]
    off = StepSettings(importance_cap=None)
    uncorrected = gradient(build(objective=GRPO(), rewards=[EvenDigits()], sampler=ShiftedEngine(3.0), settings=off))[0]
    close(near, plain * 1.5)
    close(far, plain * 2.0)
    close(uncorrected, plain)


def test_an_estimator_of_sampled_tokens_is_weighted_too() -> None:
    plain = gradient(build(divergence=K2()))[0]
    close(gradient(build(divergence=K2(), sampler=ShiftedEngine(3.0)))[0], plain * 2.0)


def test_a_reference_estimate_of_sampled_tokens_is_weighted_and_a_whole_distribution_is_not() -> None:
    def of(part: DivergenceEstimator, **slots: Any) -> Tensor:
        beta = Constant(value=1.0)
        reference = local_teacher(toy.model(2))
        extra = {"reference": reference, "reference_divergence": part, "reference_beta": beta, **slots}
        return gradient(build(objective=GRPO(), rewards=[Flat()], **extra))[0]

    close(of(K2(), sampler=ShiftedEngine(3.0)), of(K2()) * 2.0)
    close(of(ReverseKL(), sampler=ShiftedEngine(3.0)), of(ReverseKL()))


def test_unknown_behaviour_is_not_corrected() -> None:
    plain = gradient(build(objective=GRPO(), rewards=[EvenDigits()]))[0]
    close(gradient(build(objective=GRPO(), rewards=[EvenDigits()], sampler=ShiftedEngine(float("nan"))))[0], plain)
