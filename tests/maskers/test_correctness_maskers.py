"""Which responses the distillation term keeps, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from distillkit.components import Masker
from distillkit.errors import ConfigError
from distillkit.maskers.group_level import GroupLevel
from distillkit.maskers.response_level import ResponseLevel
from distillkit.maskers.routed import Routed
from distillkit.testing import rollout_batch
from distillkit.types import RewardOutput

GROUPS = {"1+1=": ["2", "3", "4", "5"], "2+2=": ["3", "5", "6", "7"], "3+3=": ["1", "2", "3", "4"]}
CORRECT = [
    *[True, False, None, False],  # a mixed group
    *[False, False, False, None],  # all wrong, one timed out
    *[None, None, None, None],  # nothing known
]


def weights_of(masker: Masker, correct: Sequence[bool | None]) -> tuple[list[int], list[int]]:
    """Return the policy and the distillation weight of each rollout, having checked that they are one per rollout."""
    rollouts = rollout_batch(GROUPS)
    values = [None if c is None else 0.0 for c in correct]  # every reward is 0: correctness must decide, not the value
    rewards = RewardOutput.single(
        "r", values, correct=correct, status=["timed_out" if c is None else "scored" for c in correct]
    )
    weights = masker(rollouts, rewards, None)
    for grid in (weights.policy, weights.distil):
        assert torch.equal(grid, grid[:, :1].expand(rollouts.tokens.shape))
    policy, distil = ([int(w) for w in grid[:, 0].tolist()] for grid in (weights.policy, weights.distil))
    return policy, distil


@pytest.mark.parametrize(
    ("masker", "want"),
    [
        (ResponseLevel(), [*[0, 1, 0, 1], *[1, 1, 1, 0], *[0, 0, 0, 0]]),
        (ResponseLevel(unknown="keep"), [*[0, 1, 1, 1], *[1, 1, 1, 1], *[1, 1, 1, 1]]),
        (GroupLevel(), [*[0, 0, 0, 0], *[1, 1, 1, 0], *[0, 0, 0, 0]]),
        (GroupLevel(unknown="keep"), [*[0, 0, 0, 0], *[1, 1, 1, 1], *[1, 1, 1, 1]]),
    ],
    ids=["response drop", "response keep", "group drop", "group keep"],
)
def test_who_is_distilled(masker: Masker, want: list[int]) -> None:
    assert weights_of(masker, CORRECT) == ([1] * 12, want)


@pytest.mark.parametrize(
    ("unknown", "distil"),
    [("drop", [*[0, 1, 0, 1], *[1, 1, 1, 0], *[0] * 4]), ("keep", [*[0, 1, 1, 1], *[1] * 4, *[1] * 4])],
)
def test_routed_gives_correct_responses_to_the_rewards_and_wrong_ones_to_the_teacher(
    unknown: str, distil: list[int]
) -> None:
    policy = [1, *[0] * 11]
    assert weights_of(Routed(unknown=unknown), CORRECT) == (policy, distil)  # type: ignore[arg-type]


def test_groups_go_by_id_and_not_by_place() -> None:
    rollouts = rollout_batch(GROUPS)
    rollouts = replace(rollouts, group_id=torch.tensor([7, -2, 7, -2, 7, -2, 7, -2, 5, 5, 5, 5]))
    correct = [True, False, False, False, False, False, False, False, False, False, False, True]
    rewards = RewardOutput.single("r", [0.0] * 12, correct=correct)
    assert GroupLevel()(rollouts, rewards, None).distil[:, 0].tolist() == [0, 1] * 4 + [0] * 4


@pytest.mark.parametrize("cls", [ResponseLevel, GroupLevel, Routed])
def test_no_rewards_is_a_config_error(cls: type[ResponseLevel] | type[GroupLevel] | type[Routed]) -> None:
    name = {"ResponseLevel": "response_level", "GroupLevel": "group_level", "Routed": "routed"}[cls.__name__]
    with pytest.raises(ConfigError) as error:
        cls()(rollout_batch(GROUPS), None, None)
    assert str(error.value) == (
        f"model.masker: {name} must know which responses are correct\n"
        "    got:      no rewards\n"
        "    expected: a reward that checks the answer\n"
        "    try:      add one of math_verify, answer, knights_and_knaves to model.rewards, or set model.masker: null"
    )


@pytest.mark.parametrize("unknown", ["keep", "drop"])
def test_rewards_that_cannot_tell_are_a_config_error(unknown: str) -> None:
    rollouts = rollout_batch(GROUPS)
    rewards = RewardOutput.merge(
        [RewardOutput.single("format", [1.0] * 12), RewardOutput.single("length", [0.0, None] * 6)]
    )
    with pytest.raises(ConfigError) as error:
        ResponseLevel(unknown=unknown)(rollouts, rewards, None)  # type: ignore[arg-type]
    assert str(error.value) == (
        "model.masker: response_level must know which responses are correct\n"
        "    got:      format, length: correctness unknown for all 12 responses\n"
        "    expected: a reward that checks the answer\n"
        "    try:      add one of math_verify, answer, knights_and_knaves to model.rewards, or set model.masker: null"
    )


def test_a_reward_that_failed_for_a_whole_batch_is_no_config_error() -> None:
    rollouts = rollout_batch(GROUPS)
    failed = RewardOutput.single("math_verify", [None] * 12, status=["timed_out"] * 12)
    rewards = RewardOutput.merge([failed, RewardOutput.single("format", [1.0] * 12)])
    assert (ResponseLevel()(rollouts, rewards, None).distil == 0).all()
    assert (GroupLevel(unknown="keep")(rollouts, rewards, None).distil == 1).all()


@pytest.mark.parametrize("cls", [ResponseLevel, GroupLevel, Routed])
def test_unknown_rule_is_checked(cls: type[ResponseLevel] | type[GroupLevel] | type[Routed]) -> None:
    with pytest.raises(ConfigError) as error:
        cls(unknown="wrong")  # type: ignore[arg-type]
    assert str(error.value) == "model.masker.unknown\n    got:      wrong\n    expected: keep or drop"
