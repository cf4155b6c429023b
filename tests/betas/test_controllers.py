"""Beta parts that follow what the run measures: by hand, at their bounds, and across a resume."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from distillkit.betas.adaptive_kl import AdaptiveKL
from distillkit.betas.reward_progress import RewardProgress
from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError


def values(schedule: BetaScheduler, measured: Sequence[float | None], signal: str, first: int = 0) -> list[float]:
    """β of steps `first`, first + 1, ...; `measured[i]` is what the step before the i-th saw."""
    return [
        schedule.value(first + i, {} if m is None else {signal: m, "train/other": 7.0}) for i, m in enumerate(measured)
    ]


KL, REWARD = "train/divergence", "train/reward"


def test_adaptive_kl_by_hand() -> None:
    """target ½, gain 0.5, limit 0.2: the errors are +0.1, +1 → 0.2, 0, −0.04, −1 → −0.2."""
    schedule = AdaptiveKL(start=1.0, target=0.5, gain=0.5)
    got = values(schedule, [None, 0.55, 1.0, 0.5, 0.48, 0.0], KL)
    assert got == pytest.approx([1.0, 1.05, 1.05 * 1.1, 1.155, 1.155 * 0.98, 1.155 * 0.98 * 0.9], rel=1e-12)


def test_adaptive_kl_stays_where_nothing_was_measured() -> None:
    schedule = AdaptiveKL(start=0.3, target=0.5)
    assert values(schedule, [None, None, math.nan, 0.5], KL) == [0.3] * 4
    assert values(AdaptiveKL(start=0.3, target=0.5), [9.0, 9.0], "train/another") == [0.3] * 2


def test_adaptive_kl_finds_the_coefficient_that_holds_the_target() -> None:
    """A student whose divergence is 1/β settles where 1/β is the target, from either side."""
    for start in (0.05, 20.0):
        schedule = AdaptiveKL(start=start, target=0.5, max=100.0, gain=0.5)
        beta = schedule.value(0, {})
        for step in range(1, 200):
            beta = schedule.value(step, {KL: 1 / beta})
        assert beta == pytest.approx(2.0, rel=1e-3)


def test_adaptive_kl_stays_within_its_bounds_and_comes_back() -> None:
    schedule = AdaptiveKL(start=1.0, target=1.0, min=0.9, max=1.1, gain=0.5)
    assert values(schedule, [9.0] * 3 + [-9.0] * 3 + [9.0], KL) == pytest.approx([1.1] * 3 + [0.99, 0.9, 0.9, 0.99])


def test_adaptive_kl_never_reaches_zero() -> None:
    schedule = AdaptiveKL(start=1.0, target=1.0, min=1e-4)
    assert min(values(schedule, [0.0] * 2000, KL)) == 1e-4


def test_reward_progress_by_hand() -> None:
    """Running means with decay ½: 0.2, 0.4, 0.3, 0.65; progress from 0.2 to 0.6: 0, ½, ¼ (½ kept), 1."""
    measured = [None, 0.2, 0.6, 0.2, 1.0]
    keeps = RewardProgress(start=1.0, end=0.2, high=0.6, decay=0.5)
    assert values(keeps, measured, REWARD) == pytest.approx([1.0, 1.0, 0.6, 0.6, 0.2])
    returns = RewardProgress(start=1.0, end=0.2, high=0.6, decay=0.5, monotone=False)
    assert values(returns, measured, REWARD) == pytest.approx([1.0, 1.0, 0.6, 0.8, 0.2])


def test_reward_progress_from_a_given_low() -> None:
    schedule = RewardProgress(start=1.0, end=0.0, low=0.0, high=1.0, decay=0.0)
    assert values(schedule, [None, 0.25, None, math.nan, 0.5, -3.0, 7.0], REWARD) == [
        1.0,
        0.75,
        0.75,
        0.75,
        0.5,
        0.5,
        0,
    ]


def test_reward_progress_that_starts_at_its_end_needs_no_teacher() -> None:
    assert values(RewardProgress(start=1.0, end=0.1, high=0.9), [0.95, 0.2], REWARD) == pytest.approx([0.1, 0.1])


def test_reward_progress_never_rises_again_when_monotone() -> None:
    rewards = [abs(math.sin(i)) * min(i / 60, 1) for i in range(120)]
    got = values(RewardProgress(start=0.5, end=0.1, high=0.6), rewards, REWARD)
    assert all(later <= earlier for earlier, later in itertools.pairwise(got))
    assert got[0] == 0.5 and got[-1] < 0.2


@pytest.mark.parametrize("first", range(0, 12, 3))
@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (AdaptiveKL, {"start": 1.0, "target": 0.5, "signal": REWARD}),
        (RewardProgress, {"start": 1.0, "end": 0.0, "high": 0.9}),
        (RewardProgress, {"start": 1.0, "end": 0.0, "high": 0.9, "low": 0.1, "monotone": False}),
    ],
    ids=["adaptive_kl", "reward_progress", "reward_progress returns"],
)
def test_a_resumed_controller_goes_on_as_the_unbroken_one(cls: Any, arguments: dict[str, Any], first: int) -> None:
    measured = [None, *(0.2 + 0.5 * math.sin(i) ** 2 for i in range(14))]
    whole = values(cls(**arguments), measured, REWARD)
    begun, resumed = cls(**arguments), cls(**arguments)
    values(begun, measured[:first], REWARD)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert values(resumed, measured[first:], REWARD, first) == whole[first:]
    assert len(set(whole)) > 4  # it did move


@pytest.mark.parametrize("part", [AdaptiveKL(start=0.5, target=1.0), RewardProgress(start=0.5, end=0.0, high=1.0)])
def test_a_checkpoint_of_another_schedule_starts_anew(part: AdaptiveKL | RewardProgress) -> None:
    part.value(1, {KL: 0.1, REWARD: 0.9})
    part.load_state_dict({})
    assert part.value(0, {}) == 0.5


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"min": 0.0}, "min", "above 0 and finite"),
        ({"max": math.inf}, "max", "at least min, and finite"),
        ({"min": 2.0, "max": 1.0}, "max", "at least min, and finite"),
        ({"start": 0.0}, "start", "between min (0.0001) and max (10.0)"),
        ({"start": math.nan}, "start", "between min (0.0001) and max (10.0)"),
        ({"target": 0.0}, "target", "above 0 nats/token and finite"),
        ({"target": math.inf}, "target", "above 0 nats/token and finite"),
        ({"gain": 0.0}, "gain", "above 0 and finite"),
        ({"limit": 0.0}, "limit", "above 0, and gain * limit below 1"),
        ({"limit": 10.0}, "limit", "above 0, and gain * limit below 1"),
    ],
    ids=str,
)
def test_bad_controllers_are_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        AdaptiveKL(**{"start": 1.0, "target": 0.5, **arguments})
    assert str(error.value) == f"AdaptiveKL.{name}\n    got:      {arguments[name]}\n    expected: {expected}"


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"start": math.nan}, "start", "a finite number"),
        ({"end": math.inf}, "end", "a finite number"),
        ({"low": math.nan}, "low", "a finite number, or null for the first mean seen"),
        ({"high": math.inf}, "high", "a finite number"),
        ({"low": 0.9, "high": 0.9}, "high", "a finite number above low (0.9)"),
        ({"decay": 1.0}, "decay", "between 0 and below 1: at 1 the mean never moves"),
        ({"decay": -0.1}, "decay", "between 0 and below 1: at 1 the mean never moves"),
    ],
    ids=str,
)
def test_bad_progress_is_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        RewardProgress(**{"start": 1.0, "end": 0.0, "high": 0.9, **arguments})
    assert str(error.value) == f"RewardProgress.{name}\n    got:      {arguments[name]}\n    expected: {expected}"
