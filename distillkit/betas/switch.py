"""One number, then another: `switch`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError, problem

__all__ = ["Switch"]


class Switch(BetaScheduler):
    """β(step) = before for step < at, after from step `at` on.

    Distilling first and learning from rewards afterwards (OPD-then-RL) is `beta: {name: switch, before: 1.0, after:
    0.0, at: 60}` with `schedules.policy_weight: {name: switch, before: 0.0, after: 1.0, at: 60}`.

    See arXiv 2609.04108, 2026, https://arxiv.org/abs/2609.04108 (OPD-then-RL, with S = 60).

    Args:
        before: value at steps 0 to at − 1.
        after: value from step `at` on.
        at: first rollout step of `after`; 0 is `after` throughout.

    Raises:
        ConfigError: `at` is not a number of steps, or a value is not finite.

    Example:
        >>> schedule = Switch(before=1.0, after=0.0, at=2)
        >>> [schedule.value(step, {}) for step in range(4)]
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, *, before: float, after: float, at: int) -> None:
        for name, value, ok, expected in (
            ("before", before, math.isfinite(before), "a finite number"),
            ("after", after, math.isfinite(after), "a finite number"),
            ("at", at, 0 <= at < math.inf, "a finite number of rollout steps, at least 0"),
        ):
            if not ok:
                raise ConfigError(problem(f"Switch.{name}", got=value, expected=expected))
        self.before = before
        self.after = after
        self.at_step = at
        self.steps_needed = at + 1 if at else 0

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return the value for rollout step `step`."""
        return self.before if step < self.at_step else self.after
