"""Micro-batches by token budget."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from distillkit.functional.packing import micro_batches


def skewed(count: int, seed: int) -> list[int]:
    """Many short rollouts, a few long ones: what sampling to an end token gives."""
    draw = random.Random(seed)
    return [min(1 + int(draw.expovariate(1 / 77)), 512) for _ in range(count)]


def padded(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [512, 1024, 4096, 10**9])
def test_every_rollout_once_and_within_the_budget(seed: int, budget: int) -> None:
    lengths = skewed(64, seed)
    batches = micro_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(64))
    assert all(len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


def test_a_rollout_above_the_budget_stands_alone() -> None:
    assert micro_batches([3, 100, 4], budget=10) == [[1], [2, 0]]
    assert micro_batches([5, 5], budget=1) == [[0], [1]]
    assert micro_batches([], budget=10) == []


def as_they_come(lengths: list[int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for i in range(len(lengths)):
        if batches[-1] and (len(batches[-1]) + 1) * max(lengths[j] for j in [*batches[-1], i]) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2048, 4096, 16384])
def test_padding_is_a_small_share_on_a_skewed_sample(seed: int, budget: int) -> None:
    lengths = skewed(64, seed)
    waste, unsorted = (
        1 - sum(lengths) / padded(batches, lengths)
        for batches in (micro_batches(lengths, budget), as_they_come(lengths, budget))
    )
    assert waste < 0.3 < 0.5 < unsorted
    assert len(micro_batches(lengths, budget)) <= 8  # and not by one rollout per micro-batch


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [100, 600, 10**6])
def test_no_other_cut_of_the_sorted_rollouts_is_cheaper(seed: int, budget: int) -> None:
    lengths, overhead = skewed(9, seed), 50
    order = sorted(range(9), key=lambda i: (-lengths[i], i))

    def price(batches: list[list[int]]) -> int:
        return padded(batches, lengths) + overhead * len(batches)

    def cuts(rest: list[int]) -> Iterator[list[list[int]]]:
        if not rest:
            yield []
        for n in range(1, len(rest) + 1):
            if n == 1 or n * lengths[rest[0]] <= budget:
                for tail in cuts(rest[n:]):
                    yield [rest[:n], *tail]

    assert price(micro_batches(lengths, budget, overhead)) == min(price(batches) for batches in cuts(order))
