"""Schedules: a number as a function of the step."""

from __future__ import annotations

import math

__all__ = ["cosine", "linear"]


def linear(step: int, start: float, end: float, steps: int) -> float:
    """Return start + (end − start) · min(step / steps, 1).

    KDRL's annealing max(β₀ − δ·step, β_min) is start = β₀, end = β_min, steps = (β₀ − β_min) / δ. See *KDRL*, Xu et
    al., 2025, https://arxiv.org/abs/2506.02208 (section 3.3).

    Example:
        >>> [round(linear(s, 5e-3, 1e-3, 80), 6) for s in (0, 1, 79, 80, 81)]
        [0.005, 0.00495, 0.00105, 0.001, 0.001]
    """
    share = min(step / steps, 1.0)
    return start * (1 - share) + end * share


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Return end + (start − end) · (1 + cos(π · min(step / steps, 1))) / 2.

    Example:
        >>> [round(cosine(s, 1.0, 0.0, 10), 3) for s in (0, 5, 10, 20)]
        [1.0, 0.5, 0.0, 0.0]
    """
    share = (1 - math.cos(math.pi * min(step / steps, 1.0))) / 2
    return start * (1 - share) + end * share
