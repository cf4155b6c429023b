"""Half a cosine between two numbers: `cosine`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError, problem
from distillkit.functional import betas as functional

__all__ = ["Cosine"]


class Cosine(BetaScheduler):
    """β(step) = end + (start − end)·(1 + cos(π·min(step/steps, 1)))/2.

    See *SGDR*, Loshchilov and Hutter, 2016, https://arxiv.org/abs/1608.03983 (eq. 5, one period without restart).

    Args:
        start: value at step 0.
        end: value from step `steps` on.
        steps: rollout steps from `start` to `end`.

    Raises:
        ConfigError: `steps` below 1 or not finite, or a value that is not finite.

    Example:
        >>> round(Cosine(start=1.0, end=0.0, steps=4).value(1, {}), 4)
        0.8536
    """

    def __init__(self, *, start: float, end: float, steps: int) -> None:
        whole = "at least 1 rollout step and finite: the schedule would never end"
        for name, value, ok, expected in (
            ("start", start, math.isfinite(start), "a finite number"),
            ("end", end, math.isfinite(end), "a finite number"),
            ("steps", steps, 1 <= steps < math.inf, whole),
        ):
            if not ok:
                raise ConfigError(problem(f"Cosine.{name}", got=value, expected=expected))
        self.start = start
        self.end = end
        self.steps = steps
        self.steps_needed = steps

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return the value for rollout step `step`."""
        return functional.cosine(step, self.start, self.end, self.steps)
