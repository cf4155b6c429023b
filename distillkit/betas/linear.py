"""A straight line between two numbers: `linear`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError, problem
from distillkit.functional import betas as functional

__all__ = ["Linear"]


class Linear(BetaScheduler):
    """β(step) = start + (end − start)·min(step/steps, 1).

    KDRL-Annealing, max(β₀ − δ·step, β_min) with β₀ = 5e-3, δ = 5e-5, β_min = 1e-3, is `start: 0.005, end: 0.001, steps:
    80`.

    See *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208 (section 3.3; read second-hand).

    Args:
        start: value at step 0.
        end: value from step `steps` on.
        steps: rollout steps from `start` to `end`.

    Raises:
        ConfigError: `steps` below 1, or a value that is not finite.

    Example:
        >>> Linear(start=1.0, end=0.0, steps=4).value(1, {})
        0.75
    """

    def __init__(self, *, start: float, end: float, steps: int) -> None:
        for name, value, ok, expected in (
            ("start", start, math.isfinite(start), "a finite number"),
            ("end", end, math.isfinite(end), "a finite number"),
            ("steps", steps, steps >= 1, "at least 1 rollout step"),
        ):
            if not ok:
                raise ConfigError(problem(f"model.beta.{name}", got=value, expected=expected))
        self.start = start
        self.end = end
        self.steps = steps

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return the value for rollout step `step`."""
        return functional.linear(step, self.start, self.end, self.steps)
