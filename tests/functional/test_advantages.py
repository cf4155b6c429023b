"""Group advantages by hand."""

from __future__ import annotations

import math

import pytest
import torch

from distillkit.functional.advantages import group_advantages

NAN = float("nan")


def advantages(rewards: list[float], groups: list[int], **switches: object) -> list[float]:
    return group_advantages(torch.tensor(rewards), torch.tensor(groups), **switches).tolist()  # type: ignore[arg-type]


def test_sample_and_population_deviation() -> None:
    # 1, 0, 0, 0: mean 1/4, squares 3/4, sample variance 1/4, population variance 3/16.
    assert advantages([1, 0, 0, 0], [0] * 4) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    population = math.sqrt(3 / 16)
    want = [0.75 / population, *[-0.25 / population] * 3]
    assert advantages([1, 0, 0, 0], [0] * 4, correction=0, eps=0.0) == pytest.approx(want, rel=1e-6)
    assert advantages([1, 0, 0, 0], [0] * 4, std=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_epsilon_is_added_to_the_deviation() -> None:
    assert advantages([1, 0], [0, 0], correction=0, eps=0.5) == [0.5, -0.5]  # 0.5 / (0.5 + 0.5)


def test_ragged_groups_in_any_order_with_any_ids() -> None:
    # group 9: 1, 0; group -4: 3, 0, 0; group 0: alone.
    got = advantages([3, 1, 5, 0, 0, 0], [-4, 9, 0, 9, -4, -4], std=False)
    assert got == [2.0, 0.5, 0.0, -0.5, -1.0, -1.0]


def test_not_scored_rewards_are_left_out() -> None:
    assert advantages([1, NAN, 0], [0, 0, 0], std=False) == [0.5, 0.0, -0.5]  # mean of two, not of three
    assert advantages([1, NAN, NAN], [0, 0, 0]) == [0.0, 0.0, 0.0]  # one scored: no baseline
    assert advantages([NAN, NAN], [0, 0]) == [0.0, 0.0]
    known = advantages([1, 0, 0, 0], [0] * 4)
    assert advantages([1, NAN, 0, 0, 0], [0] * 5) == [known[0], 0.0, *known[1:]]


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.0, -1e6, 1e-8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_equal_rewards_give_exactly_zero(value: float, size: int) -> None:
    # The float mean of ten times 0.1 is not 0.1; divided by a tiny deviation the rounding error would become a signal.
    for switches in ({}, {"eps": 0.0}, {"correction": 0, "eps": 0.0}, {"std": False}):
        assert advantages([value] * size, [3] * size, **switches) == [0.0] * size
        assert advantages([*[value] * size, NAN], [3] * (size + 1), **switches) == [0.0] * (size + 1)


def test_groups_are_independent_and_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, groups = torch.rand(24, generator=generator), torch.arange(24) // 6
    whole = group_advantages(rewards, groups)
    alone = torch.cat([group_advantages(rewards[groups == g], groups[groups == g]) for g in range(4)])
    assert torch.equal(whole, alone)
    order = torch.randperm(24, generator=generator)
    torch.testing.assert_close(group_advantages(rewards[order], groups[order]), whole[order], rtol=1e-6, atol=1e-7)
    assert torch.equal(group_advantages(rewards, 7 - 3 * groups), whole)


def test_result_is_detached_float32_and_zero_mean() -> None:
    rewards = torch.rand(8, dtype=torch.float64, requires_grad=True)
    got = group_advantages(rewards, torch.zeros(8, dtype=torch.long))
    assert got.dtype == torch.float32 and not got.requires_grad
    assert got.sum().abs() < 1e-5
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
