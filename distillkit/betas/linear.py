"""A straight line between two numbers: `linear`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError, problem
from distillkit.functional import betas as functional

__all__ = ["Linear"]


class Linear(BetaScheduler):
    """β(step) = start + (end − start)·min(step/steps, 1), or max(start − delta·step, end): the same line by its slope.

    KDRL-Annealing, max(β₀ − δ·step, β_min) with β₀ = 5e-3, δ = 5e-5, β_min = 1e-3, is `start: 0.005, end: 0.001, delta:
    0.00005`; it reaches its end after 80 steps, so `steps: 80` says the same.

    See *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208 (section 3.3; read second-hand).

    Args:
        start: value at step 0.
        end: the value it stops at.
        steps: rollout steps from `start` to `end`; give this or `delta`.
        delta: how far it moves towards `end` in one rollout step, above 0; give this or `steps`.

    Raises:
        ConfigError: both or neither of `steps` and `delta`, a line that never ends, or a value that is not finite.

    Example:
        >>> Linear(start=1.0, end=0.0, steps=4).value(1, {})
        0.75
        >>> Linear(start=1.0, end=0.0, delta=0.5).value(1, {})
        0.5
    """

    def __init__(self, *, start: float, end: float, steps: int | None = None, delta: float | None = None) -> None:
        if (steps is None) == (delta is None):
            where = "Linear: a line needs its length or its slope"
            given = "neither steps nor delta" if steps is None else f"steps {steps} and delta {delta}"
            raise ConfigError(problem(where, got=given, expected="one of steps and delta", hint="steps: 80"))
        whole = "at least 1 rollout step and finite: the schedule would never end"
        slope = f"above 0 and finite (it moves towards end, {end}): the schedule would never end"
        for name, value, ok, expected in (
            ("start", start, math.isfinite(start), "a finite number"),
            ("end", end, math.isfinite(end), "a finite number"),
            ("steps", steps, steps is None or 1 <= steps < math.inf, whole),
            ("delta", delta, delta is None or 0 < delta < math.inf, slope),
        ):
            if not ok:
                raise ConfigError(problem(f"Linear.{name}", got=value, expected=expected))
        self.start = start
        self.end = end
        self.steps = steps
        self.delta = delta
        self.steps_needed = steps if delta is None else _steps(start, end, delta)

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return the value for rollout step `step`."""
        if self.delta is not None:
            return functional.annealed(step, self.start, self.end, self.delta)
        assert self.steps is not None
        return functional.linear(step, self.start, self.end, self.steps)


def _steps(start: float, end: float, delta: float) -> int | None:
    """Steps of size delta from start to end; None where no float counts them."""
    steps = abs(start - end) / delta
    return math.ceil(steps - 1e-9 * steps) if math.isfinite(steps) else None
