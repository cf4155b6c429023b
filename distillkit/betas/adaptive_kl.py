"""A coefficient that holds a divergence near a target: `adaptive_kl`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError, problem
from distillkit.functional import betas as functional

__all__ = ["AdaptiveKL"]


class AdaptiveKL(BetaScheduler):
    """β ← β·(1 + gain·clip(measured/target − 1, ±limit)), kept within [min, max].

    A student further from the teacher than `target` raises the pull, a nearer one lowers it. Where the step before
    measured nothing (at step 0, or when no token was taught) β stays.

    See *Fine-Tuning Language Models from Human Preferences*, Ziegler et al., 2019, https://arxiv.org/abs/1909.08593
    (section 2.2: gain 0.1, limit 0.2), there for the KL to a reference. No source has it for a teacher.

    Args:
        start: β at step 0.
        target: where the divergence is to be held, in nats/token of the divergence that is measured (½d² for k2).
        min: smallest β, above 0: from 0 it could not come back.
        max: largest β.
        gain: share of the (clipped) relative error by which β moves in one step.
        limit: bound on the relative error, so that one odd batch moves little.
        signal: metric of the step before to hold; `train/reference_divergence` for `model.reference_beta`.

    Raises:
        ConfigError: an argument out of its range.

    Example:
        >>> schedule = AdaptiveKL(start=0.1, target=0.5)
        >>> [round(schedule.value(s, {"train/divergence": kl} if s else {}), 5) for s, kl in enumerate((9, 9, 0.5, 0))]
        [0.1, 0.102, 0.102, 0.09996]
    """

    def __init__(
        self,
        *,
        start: float,
        target: float,
        min: float = 1e-4,
        max: float = 10.0,
        gain: float = 0.1,
        limit: float = 0.2,
        signal: str = "train/divergence",
    ) -> None:
        for name, value, ok, expected in (
            ("min", min, 0 < min < math.inf, "above 0 and finite"),
            ("max", max, min <= max < math.inf, "at least min, and finite"),
            ("start", start, min <= start <= max, f"between min ({min}) and max ({max})"),
            ("target", target, 0 < target < math.inf, "above 0 nats/token and finite"),
            ("gain", gain, 0 < gain < math.inf, "above 0 and finite"),
            ("limit", limit, limit > 0 and gain * limit < 1, "above 0, and gain * limit below 1"),
        ):
            if not ok:
                raise ConfigError(problem(f"AdaptiveKL.{name}", got=value, expected=expected))
        self.start = start
        self.target = target
        self.min = min
        self.max = max
        self.gain = gain
        self.limit = limit
        self.signal = signal
        self._value = start

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return β for rollout step `step`, having moved it by what the step before measured."""
        measured = signals.get(self.signal, math.nan)
        if not math.isnan(measured):
            moved = functional.proportional(self._value, measured, self.target, self.gain, self.limit)
            self._value = min(max(moved, self.min), self.max)
        return self._value

    def state_dict(self) -> dict[str, Any]:
        """Return β."""
        return {"value": self._value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore β; without one (a checkpoint of another schedule) β stays at `start`."""
        self._value = state.get("value", self.start)
