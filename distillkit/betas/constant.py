"""A number that stays: `constant`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError, problem

__all__ = ["Constant"]


class Constant(BetaScheduler):
    """β(step) = value.

    The right β depends on the reward's scale and the aggregation: KDRL has 0.002, replications 0.002 to 0.2.

    See *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208 (section 3.3; read second-hand).

    Args:
        value: the number, at every step.

    Raises:
        ConfigError: it is not finite.
    """

    def __init__(self, *, value: float) -> None:
        if not math.isfinite(value):
            raise ConfigError(problem("Constant.value", got=value, expected="a finite number"))
        self._value = value
        self.steps_needed = 0

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        """Return the number."""
        return self._value
