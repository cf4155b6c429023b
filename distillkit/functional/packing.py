"""Micro-batches by token budget."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["in_order_micro_batches", "micro_batches", "packed_micro_batches"]


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


def packed_micro_batches(
    groups: Sequence[int], prompts: Sequence[int], lengths: Sequence[int], budget: int
) -> list[list[int]]:
    """Split rollouts into micro-batches without padding, in which a group's prompt stands once.

    Groups stay whole where they fit: a group that does not fit into what is left of a micro-batch begins the next one,
    and only one larger than the budget is spread over several. A single rollout longer than the budget is a
    micro-batch of its own.

    Args:
        groups: which prompt each rollout answers.
        prompts: tokens of each rollout's prompt.
        lengths: tokens of each rollout, its prompt included.
        budget: tokens of a micro-batch.

    Returns:
        Positions into `lengths`, every one exactly once; groups in the order of their first rollout.

    Example:
        >>> packed_micro_batches([7, 8, 7, 8], prompts=[4, 1, 4, 1], lengths=[6, 4, 7, 4], budget=10)
        [[0, 2], [1, 3]]
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    batches: list[list[int]] = []
    left = 0
    for rows in members.values():
        prompt = prompts[rows[0]]
        if left < prompt + sum(lengths[i] - prompt for i in rows):
            left = 0
        begun = False
        for i in rows:
            needed = lengths[i] - (prompt if begun else 0)
            if not batches or needed > left:
                batches.append([])
                left, needed = budget, lengths[i]
            batches[-1].append(i)
            left, begun = left - needed, True
    return batches


def in_order_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split rollouts as they come into micro-batches whose padded size stays within `budget` tokens.

    Example:
        >>> in_order_micro_batches([3, 9, 4, 8], budget=18)
        [[0, 1], [2, 3]]
    """
    batches: list[list[int]] = []
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = length
        batches[-1].append(i)
    return batches
