"""Schedules: a number as a function of the step."""

from __future__ import annotations

import math

__all__ = ["annealed", "cosine", "linear", "progress", "proportional"]


def linear(step: int, start: float, end: float, steps: int) -> float:
    """Return start + (end − start) · min(step / steps, 1).

    KDRL's annealing is this with steps = (start − end) / δ; `annealed` takes δ itself.

    Example:
        >>> [round(linear(s, 5e-3, 1e-3, 80), 6) for s in (0, 1, 79, 80, 81)]
        [0.005, 0.00495, 0.00105, 0.001, 0.001]
    """
    share = min(step / steps, 1.0)
    return start * (1 - share) + end * share


def annealed(step: int, start: float, end: float, delta: float) -> float:
    """Return max(start − delta · step, end), or min(start + delta · step, end) where the end is the higher one.

    See *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208 (section 3.3).

    Example:
        >>> [round(annealed(s, 5e-3, 1e-3, 5e-5), 6) for s in (0, 1, 79, 80, 81)]
        [0.005, 0.00495, 0.00105, 0.001, 0.001]
    """
    return max(start - delta * step, end) if start >= end else min(start + delta * step, end)


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Return end + (start − end) · (1 + cos(π · min(step / steps, 1))) / 2.

    Example:
        >>> [round(cosine(s, 1.0, 0.0, 10), 3) for s in (0, 5, 10, 20)]
        [1.0, 0.5, 0.0, 0.0]
    """
    share = (1 - math.cos(math.pi * min(step / steps, 1.0))) / 2
    return start * (1 - share) + end * share


def proportional(value: float, measured: float, target: float, gain: float, limit: float) -> float:
    """Return value · (1 + gain · clip(measured/target − 1, −limit, limit)).

    See *Fine-Tuning Language Models from Human Preferences*, Ziegler et al., 2019, https://arxiv.org/abs/1909.08593
    (section 2.2).

    Example:
        >>> [round(proportional(1.0, m, 0.5, 0.1, 0.2), 3) for m in (0.0, 0.45, 0.5, 0.55, 5.0)]
        [0.98, 0.99, 1.0, 1.01, 1.02]
    """
    return value * (1 + gain * min(max(measured / target - 1, -limit), limit))


def progress(value: float, low: float, high: float) -> float:
    """Return how far `value` is on the way from `low` to `high`, in [0, 1]; 1 where the way has no length.

    Example:
        >>> [progress(v, 0.25, 0.75) for v in (0.0, 0.25, 0.5, 2.0)]
        [0.0, 0.0, 0.5, 1.0]
    """
    return 1.0 if low >= high else min(max((value - low) / (high - low), 0.0), 1.0)
