"""The largest micro-batch and the most rollouts at once that a rank's memory takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from distillkit.planning.layers import cache_bytes
from distillkit.planning.memory import phases
from distillkit.planning.workload import Workload

__all__ = ["Fit", "largest"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`tokens_per_micro_batch` is None where not even one longest rollout fits; `rows` likewise.

    `rows`: rollouts decoded at once, in the rank's cache or in each engine's.
    """

    tokens_per_micro_batch: int | None
    rows: int | None


def largest(load: Workload, memory: float) -> Fit:
    """Return the largest settings under which every phase stays within `memory` bytes, each changed alone.

    A micro-batch is counted in rollouts of the longest kind.
    """

    def need(changed: Workload, names: tuple[str, ...]) -> float:
        return max((phase.total for phase in phases(changed) if phase.name in names), default=0.0)

    def with_rows(rows: int) -> Workload:
        return replace(load, tokens_per_micro_batch=rows * load.longest)

    def at_once(rows: int) -> Workload:
        return replace(load, sampling=replace(load.sampling, rows=rows))

    rows = _most(load.rollouts, lambda n: need(with_rows(n), ("update", "optimizer")) <= memory)
    decoded: int | None = None
    if load.sampling.kind == "hf":
        decoded = _most(load.rollouts, lambda n: need(at_once(n), ("rollout",)) <= memory)
    elif load.sampling.kv_cache_bytes:
        decoded = int(load.sampling.kv_cache_bytes // cache_bytes(load, load.longest)) or None
    return Fit(tokens_per_micro_batch=None if rows is None else rows * load.longest, rows=decoded)


def _most(limit: int, fits: Callable[[int], bool]) -> int | None:
    """The largest n in 1 … limit that fits, None when 1 does not; needs grow with n, but for the whole step at once."""
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None
