"""GRPO: advantages on tokens, the loss by hand, and what it logs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.functional.objectives import clipped_policy_loss, dual_clip
from distillkit.objectives.grpo import GRPO
from distillkit.testing import reward_output, rollout_batch
from distillkit.types import RewardOutput, StudentScores

GROUPS = {"1+1=": ["2", "33", "4", "5"]}


def scores(log_ratio: Tensor) -> tuple[StudentScores, Tensor]:
    """A student at `log_ratio` from an old policy of log-prob −1; [n, L], all positions scored."""
    old = torch.full_like(log_ratio, -1.0)
    logprobs = (old + log_ratio).requires_grad_()
    mask = torch.ones(log_ratio.shape, dtype=torch.bool)
    return StudentScores(loss_mask=mask, logprobs=logprobs, distil_logprobs=logprobs), old


def test_advantages_stand_on_every_sampled_token_and_nowhere_else() -> None:
    rollouts = rollout_batch({"1+1=": ["2", "3#3"], "3=": ["3", "4"]}, observation="#")
    rewards = reward_output(4, [1.0, 0.0, 2.0, 2.0])
    got = GRPO(std=False).advantages(rollouts, rewards, None)
    assert got.tolist() == [
        [0, 0, 0, 0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 0, -0.5, 0, -0.5, -0.5],
        [0.0] * 8,
        [0.0] * 8,
    ]


@pytest.mark.parametrize(
    ("switches", "want"),
    [
        ({"std": False}, [0.75, -0.25, -0.25, -0.25]),
        ({}, [1.5, -0.5, -0.5, -0.5]),
        ({"correction": 0, "eps": 0.0}, [math.sqrt(3), *[-1 / math.sqrt(3)] * 3]),
        ({"eps": 0.5}, [0.75, -0.25, -0.25, -0.25]),
    ],
    ids=str,
)
def test_switches_of_the_advantage(switches: dict[str, Any], want: list[float]) -> None:
    rollouts, rewards = rollout_batch(GROUPS), reward_output(4, [1.0, 0.0, 0.0, 0.0])
    assert GRPO(**switches).advantages(rollouts, rewards, None)[:, 4].tolist() == pytest.approx(want, abs=1e-5)


def test_not_scored_rollouts_are_left_out_of_their_group() -> None:
    rollouts, rewards = rollout_batch(GROUPS), reward_output(4, [1.0, None, 0.0, None])
    assert GRPO(std=False).advantages(rollouts, rewards, None)[:, 4].tolist() == [0.5, 0.0, -0.5, 0.0]


def test_token_rewards_are_added_after_the_group_is_normalised() -> None:
    rollouts = rollout_batch(GROUPS)
    own = torch.zeros(rollouts.tokens.shape)
    own[1, 5], own[2, 4], own[3, 4], own[0, 0] = 7.0, torch.nan, 9.0, 5.0
    rewards = replace(reward_output(4, [1.0, 0.0, 0.0, None]), token_values=own)
    got = GRPO(std=False).advantages(rollouts, rewards, None)
    third = 1 / 3
    want = torch.tensor([[2 * third, 2 * third, 0], [-third, 7 - third, -third], [-third, -third, 0], [0, 0, 0]])
    torch.testing.assert_close(got[:, 4:], want)  # NaN adds nothing, a rollout without a reward has none
    assert (got[:, :4] == 0).all()  # and the prompt's token reward is not the student's doing


def test_loss_is_the_clipped_surrogate() -> None:
    log_ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    student, old = scores(log_ratio)
    loss = GRPO(clip_high=0.28).loss(student, old, None, advantages)
    torch.testing.assert_close(loss, torch.tensor([[-2.56, -1.0, 3.0, 1.6]]))
    (gradient,) = torch.autograd.grad(loss.sum(), student.logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -1.0, 3.0, 0.0]]))


def test_dual_clip_is_off_unless_set() -> None:
    student, old = scores(torch.tensor([[9.0]]).log())
    advantages = torch.tensor([[-1.0]])
    assert GRPO().loss(student, old, None, advantages).item() == pytest.approx(9.0, rel=1e-6)
    capped = GRPO(dual_clip=3.0).loss(student, old, None, advantages)
    plain = clipped_policy_loss(student.logprobs - old, advantages, 0.2, 0.2)
    assert torch.equal(capped, dual_clip(plain, advantages, 3.0)) and capped.item() == 3.0


def test_diagnostics_say_where_the_gradient_went() -> None:
    log_ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0, 4.0, 1.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0]])
    student, old = scores(log_ratio)
    part = GRPO(dual_clip=3.0)
    found = part.diagnostics(student, old, None, advantages)
    assert found["clipped_high"].tolist() == [[1, 0, 0, 0, 0, 0, 0]]
    assert found["clipped_low"].tolist() == [[0, 0, 0, 1, 0, 0, 0]]
    assert found["clipped_dual"].tolist() == [[0, 0, 0, 0, 0, 1, 0]]
    torch.testing.assert_close(found["ratio"], log_ratio.exp())
    clipped = sum(found[name] for name in ("clipped_high", "clipped_low", "clipped_dual"))
    (gradient,) = torch.autograd.grad(part.loss(student, old, None, advantages).sum(), student.logprobs)
    assert torch.equal(gradient == 0, (clipped == 1) | (advantages == 0))
    assert "clipped_dual" not in GRPO().diagnostics(student, old, None, advantages)


def test_logged_distance_is_the_reverse_kl_to_the_old_policy() -> None:
    """Unbiased over tokens of the old policy, exactly: Σ_v π_old(v)·value(v) = KL(π_θ‖π_old)."""
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(1, 6, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    student = StudentScores(loss_mask=torch.ones(1, 6, dtype=torch.bool), logprobs=new, distil_logprobs=new)
    value = GRPO().diagnostics(student, old, None, torch.zeros(1, 6))["reverse_kl_to_old"]
    assert (value >= 0).all()
    assert (old.exp() * value).sum().item() == pytest.approx((new.exp() * (new - old)).sum().item(), rel=1e-12)


def test_old_policy_is_detached() -> None:
    student, old = scores(torch.zeros(1, 3))
    old.requires_grad_()
    loss = GRPO().loss(student, old, None, torch.ones(1, 3))
    assert torch.autograd.grad(loss.sum(), old, allow_unused=True)[0] is None


def test_defaults_and_published_settings() -> None:
    part = GRPO()
    assert (part.std, part.correction, part.aggregation, part.clip_low, part.clip_high) == (True, 1, "token", 0.2, 0.2)
    assert GRPO(std=False, aggregation="constant", constant_length=3000).constant_length == 3000


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"correction": 2}, "correction", "0 (population) or 1 (sample)"),
        ({"eps": -1e-6}, "eps", "at least 0"),
        ({"aggregation": "batchmean"}, "aggregation", "token, sequence or constant"),
        ({"constant_length": 0, "aggregation": "constant"}, "constant_length", "at least 1 token, or null"),
        ({"constant_length": 100}, "constant_length", "null unless aggregation is constant"),
        ({"clip_low": 1.5}, "clip_low", "between 0 and 1"),
        ({"clip_low": float("nan")}, "clip_low", "between 0 and 1"),
        ({"clip_high": -0.1}, "clip_high", "at least 0"),
        ({"dual_clip": 1.0}, "dual_clip", "above 1, or null for none"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        GRPO(**arguments)
    assert str(error.value) == f"model.objective.{name}\n    got:      {arguments[name]}\n    expected: {expected}"


def test_scheduled_clip_changes_a_copy() -> None:
    part = GRPO()
    student, old = scores(torch.tensor([[2.0]]).log())
    changed = part.at({"clip_high": 0.5}).loss(student, old, None, torch.ones(1, 1))
    assert changed.item() == -1.5 and part.clip_high == 0.2


def test_rewards_of_several_kinds_are_weighted_before_the_group() -> None:
    rollouts = rollout_batch(GROUPS)
    both = RewardOutput.merge(
        [
            RewardOutput.single("right", [1.0, 0.0, 0.0, 0.0]),
            RewardOutput.single("short", [0.0, 1.0, None, 0.0], weight=0.5),
        ]
    )
    got = GRPO(std=False).advantages(rollouts, both, None)[:, 4]
    assert got.tolist() == pytest.approx([0.625, 0.125, -0.375, -0.375])
