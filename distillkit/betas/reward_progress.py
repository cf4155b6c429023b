"""A coefficient that falls as the rewards rise: `reward_progress`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError, problem
from distillkit.functional import betas as functional

__all__ = ["RewardProgress"]


class RewardProgress(BetaScheduler):
    """β = start + (end − start)·p, p = clip((m − low)/(high − low), 0, 1), m the running mean of the reward.

    m ← decay·m + (1 − decay)·reward, from the first reward on. The teacher leads while the student earns little and
    lets go as the student earns by itself, however many steps that takes. Until a reward is known β is `start`.

    This is a schedule of this package: KDRL leaves adapting β to the training's progress open (*KDRL*, Xu et al., 2025,
    https://arxiv.org/abs/2506.02208).

    Args:
        start: β where the reward is `low`.
        end: β from a reward of `high` on.
        high: the running mean at which the teacher is no longer needed.
        low: the running mean at which it is needed most; null is the first one seen.
        decay: share of the running mean that stays in a step, from 0 (no memory) to below 1.
        monotone: keep the furthest progress so far, so that a bad batch does not bring β back.
        signal: metric of the step before: `train/reward` is the mean total, `train/correct` the correct share.

    Raises:
        ConfigError: an argument out of its range.

    Example:
        >>> schedule = RewardProgress(start=1.0, end=0.0, low=0.2, high=0.6, decay=0.0)
        >>> [schedule.value(s, {"train/reward": r} if s else {}) for s, r in enumerate((9, 0.2, 0.4, 0.3, 0.9))]
        [1.0, 1.0, 0.5, 0.5, 0.0]
    """

    def __init__(
        self,
        *,
        start: float,
        end: float,
        high: float,
        low: float | None = None,
        decay: float = 0.9,
        monotone: bool = True,
        signal: str = "train/reward",
    ) -> None:
        above = "a finite number" if low is None else f"a finite number above low ({low})"
        for name, value, ok, expected in (
            ("start", start, math.isfinite(start), "a finite number"),
            ("end", end, math.isfinite(end), "a finite number"),
            ("low", low, low is None or math.isfinite(low), "a finite number, or null for the first mean seen"),
            ("high", high, math.isfinite(high) and (low is None or high > low), above),
            ("decay", decay, 0 <= decay < 1, "between 0 and below 1: at 1 the mean never moves"),
        ):
            if not ok:
                raise ConfigError(problem(f"RewardProgress.{name}", got=value, expected=expected))
        self.start = start
        self.end = end
        self.high = high
        self.low = low
        self.decay = decay
        self.monotone = monotone
        self.signal = signal
        self._first: float | None = None
        self._mean: float | None = None
        self._progress = 0.0

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return β for rollout step `step`, having taken in the reward of the step before."""
        reward = signals.get(self.signal, math.nan)
        if not math.isnan(reward):
            self._mean = reward if self._mean is None else self.decay * self._mean + (1 - self.decay) * reward
            self._first = self._mean if self._first is None else self._first
            low = self._first if self.low is None else self.low
            reached = functional.progress(self._mean, low, self.high)
            self._progress = max(reached, self._progress) if self.monotone else reached
        return self.start * (1 - self._progress) + self.end * self._progress

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean, the first one, and the progress."""
        return {"first": self._first, "mean": self._mean, "progress": self._progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; without one (a checkpoint of another schedule) it starts anew."""
        self._first, self._mean = state.get("first"), state.get("mean")
        self._progress = state.get("progress", 0.0)
