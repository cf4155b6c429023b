"""How sure one may be of a difference between two sets of per-problem results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distillkit.errors import ConfigError, ShapeError, problem

__all__ = ["Interval", "paired_bootstrap"]

_CELLS = 2**22
"""Numbers of one block of resamples: 32 MiB."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval [low, high] at `level`, from `problems` paired results."""

    estimate: float
    low: float
    high: float
    level: float
    problems: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a: Sequence[float] | NDArray[np.float64],
    b: Sequence[float] | NDArray[np.float64],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return mean(b − a) over problems with its percentile interval.

    Problems are drawn with replacement, each with its two results, so what makes a problem hard for both does not widen
    the interval. It speaks of the choice of problems alone: other seeds of training are not in it. See *An Introduction
    to the Bootstrap*, Efron and Tibshirani, 1993, chapter 13.

    Args:
        a: [n] result of each problem, the first group's.
        b: [n] of the same problems, the other's.
        resamples: of the n problems.
        seed: of the draws; the same call gives the same interval.
        level: share of the resamples within the interval.

    Raises:
        ShapeError: other lengths, no problem at all, or a result that is not finite.
        ConfigError: no resample, or a level outside (0, 1).

    Example:
        >>> paired_bootstrap([0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 1.5, 1.5])
        Interval(estimate=0.5, low=0.5, high=0.5, level=0.95, problems=4)
    """
    if resamples < 1:
        raise ConfigError(problem("paired_bootstrap: resamples", got=resamples, expected="at least 1"))
    if not 0 < level < 1:
        raise ConfigError(problem("paired_bootstrap: level", got=level, expected="between 0 and 1"))
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if ours.ndim != 1 or ours.shape != theirs.shape or not len(ours):
        got = f"shapes {list(ours.shape)} and {list(theirs.shape)}"
        raise ShapeError(problem("paired_bootstrap: results", got=got, expected="one number per problem, in both"))
    difference = theirs - ours
    if not np.isfinite(difference).all():
        where = f"paired_bootstrap: problem {int(np.argmin(np.isfinite(difference)))}"
        raise ShapeError(problem(where, got="a result that is not finite", expected="finite numbers"))
    generator, count = np.random.default_rng(seed), len(difference)
    block = max(_CELLS // count, 1)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    means = np.concatenate([difference[generator.integers(0, count, (size, count))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=float(difference.mean()), low=float(low), high=float(high), level=level, problems=count)
