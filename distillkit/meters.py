"""Means over all ranks and micro-batches of one step, from sums and counts."""

from __future__ import annotations

import torch
from torch import Tensor

from distillkit.backends import StepBackend
from distillkit.types import NOT_A_SCORE, RewardOutput, RolloutBatch

__all__ = ["Meters", "reward_meters", "rollout_meters", "staleness_meter"]


class Meters:
    """Sums and counts by metric name; `reduce` adds them over ranks and divides once.

    Example:
        >>> meters = Meters()
        >>> meters.add("train/reward", torch.tensor([1.0, 0.0]), torch.tensor([True, True]))
        >>> meters.local()["train/reward"]
        0.5
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the values where `mask` is True to the mean `name`."""
        kept = values.detach()[mask].double()
        self.add_sum(name, float(kept.sum()), float(kept.numel()))

    def add_sum(self, name: str, total: float, count: float) -> None:
        """Add a sum over `count` entries to the mean `name`."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def add_count(self, name: str, count: float) -> None:
        """Add to a plain count, summed over ranks and not divided."""
        self.add_sum(f"#{name}", count, 0.0)

    def local(self) -> dict[str, float]:
        """Return this rank's means; a mean over nothing is left out."""
        return self._means({name: pair for name, pair in sorted(self._sums.items())})

    def reduce(self, backend: StepBackend, device: torch.device) -> dict[str, float]:
        """Return the means over all ranks. Every rank must hold the same names."""
        names = sorted(self._sums)
        table = torch.tensor([self._sums[n] for n in names], dtype=torch.float64, device=device).reshape(-1, 2)
        totals = backend.all_reduce(table, "sum").tolist()
        return self._means({name: (row[0], row[1]) for name, row in zip(names, totals, strict=True)})

    @staticmethod
    def _means(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        counts = {name[1:]: total for name, (total, _) in sums.items() if name.startswith("#")}
        means = {n: total / count for n, (total, count) in sums.items() if not n.startswith("#") and count > 0}
        return {**means, **counts}


def rollout_meters(meters: Meters, rollouts: RolloutBatch) -> None:
    """Record completion length (tokens) and the truncated share."""
    everything = torch.ones(len(rollouts), dtype=torch.bool, device=rollouts.tokens.device)
    meters.add("train/completion_length", rollouts.completion_lengths, everything)
    meters.add("train/truncated", rollouts.truncated.float(), everything)


def staleness_meter(meters: Meters, rollouts: RolloutBatch, step: int) -> None:
    """Record how many steps older than `step` the weights are that sampled a token, on average."""
    drawn = rollouts.loss_mask & (rollouts.policy_version >= 0)
    meters.add("train/staleness", (step - rollouts.policy_version).float(), drawn)


def reward_meters(meters: Meters, rewards: RewardOutput) -> None:
    """Record the total, each reward, the correct share, and every status other than `scored` as a count."""
    total = rewards.total
    meters.add("train/reward", total, ~total.isnan())
    meters.add_count("train/unscored", float(total.isnan().sum()))
    meters.add("train/correct", (rewards.correct == 1).float(), rewards.correct >= 0)
    for column, name in enumerate(rewards.names):
        values = rewards.values[:, column]
        meters.add(f"train/reward/{name}", values, ~values.isnan())
        for status in ("unparseable", "not_applicable", *sorted(NOT_A_SCORE)):
            meters.add_count(f"train/{status}/{name}", float(rewards.status[column].count(status)))
