"""Micro-batches by token budget."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["micro_batches"]


def micro_batches(lengths: Sequence[int], budget: int, overhead: int = 512) -> list[list[int]]:
    """Split rollouts into micro-batches whose padded size, rows × longest row, stays within `budget` tokens.

    Rows are ordered from the longest to the shortest and cut where Σ (padded size + overhead) is least: filling every
    micro-batch to the budget would pad a few long rollouts' worth of tokens onto all the short ones. A row longer than
    the budget is a micro-batch of its own.

    Args:
        lengths: tokens of each rollout.
        budget: tokens, padding included.
        overhead: what one more micro-batch costs, in tokens of padding that it has to save.

    Returns:
        Positions into `lengths`, every one exactly once; the longest rows come first.

    Example:
        >>> micro_batches([3, 9, 4, 8], budget=18)
        [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cost: list[float] = [0.0]  # cost[n]: the least for the n longest rows, whose last micro-batch starts at start[n]
    start = [0]
    for end in range(1, len(order) + 1):
        cost.append(float("inf"))
        start.append(0)
        # The padded size obeys the quadrangle inequality, so the best start never moves back as the end moves on.
        for first in range(end - 1, start[end - 1] - 1, -1):
            size = (end - first) * lengths[order[first]]
            if size > budget and first < end - 1:
                break
            if cost[first] + size + overhead < cost[end]:
                cost[end], start[end] = cost[first] + size + overhead, first
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.insert(0, order[start[end] : end])
        end = start[end]
    return batches
