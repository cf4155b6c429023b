"""Runs beside each other: what differs in their configs, seeds grouped, results with their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distillkit.evaluation.bootstrap import Interval, paired_bootstrap
from distillkit.reporting.compared_runs import ABSENT, ComparedRun, read_runs, shared_sets

__all__ = ["Comparison", "Group", "Spread", "compare_runs"]

_LESS_IS_BETTER = frozenset({"truncated", "length", "unscored"})


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean of a number over `count` runs, and its sample standard deviation (None for one run)."""

    mean: float
    deviation: float | None
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of at least one value.

        Example:
            >>> Spread.of([1.0, 3.0])
            Spread(mean=2.0, deviation=1.4142135623730951, count=2)
        """
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Spread(mean=statistics.fmean(values), deviation=deviation, count=len(values))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but what is told apart."""

    label: str
    runs: tuple[ComparedRun, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that its runs share."""
        return self.runs[0].settings

    def final(self, metric: str) -> Spread | None:
        """The metric at each run's last evaluation; None where a run does not have it."""
        values = [run.curve(metric).get(run.step) for run in self.runs]
        return None if None in values else Spread.of([v for v in values if v is not None])

    def best(self, metric: str) -> Spread | None:
        """The metric at each run's best evaluation: chosen on the same problems, so too good to be true."""
        curves = [run.curve(metric).values() for run in self.runs]
        choose = min if metric in _LESS_IS_BETTER else max
        return Spread.of([choose(curve) for curve in curves]) if all(curves) else None

    def results(self) -> dict[int, float]:
        """Each problem's result, averaged over the runs that know one; NaN where none does."""
        found = {}
        for index in self.runs[0].results:
            known = [run.results[index] for run in self.runs if not math.isnan(run.results[index])]
            found[index] = statistics.fmean(known) if known else math.nan
        return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Groups of runs on one evaluation set by one metric.

    `other_sets` are the further sets that all runs share. `differences`: dotted path -> value of each group, where not
    all are the same. `metrics`: names logged for the set, `metric` first. `intervals`: of mean(group − first group),
    for every group but the first; None where no problem is known to both.
    """

    set_name: str
    other_sets: tuple[str, ...]
    metric: str
    metrics: tuple[str, ...]
    groups: tuple[Group, ...]
    differences: Mapping[str, tuple[Any, ...]]
    intervals: tuple[Interval | None, ...]

    @property
    def runs(self) -> tuple[ComparedRun, ...]:
        """Every run, group by group."""
        return tuple(run for group in self.groups for run in group.runs)


def compare_runs(
    folders: Sequence[str | Path],
    *,
    set_name: str | None = None,
    metric: str = "pass@1",
    ignore: Sequence[str] = (),
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Read run folders and compare them; the groups stand in the order in which their first runs are given.

    Args:
        folders: of runs of the command line, finished or not, with an evaluation each.
        set_name: evaluation set; None takes the first of the config's `data.val` that all runs share.
        metric: of the set, such as `pass@1`, `mean@8` or `length`.
        ignore: dotted paths that make no difference, such as `model.student` of runs that go on from others.
        resamples: of the paired bootstrap.
        seed: of the paired bootstrap.

    Raises:
        ConfigError: not a run folder, given twice, without an evaluation, no common set, no such metric.
        DataError: a file that cannot be read, or evaluations on different problems.
    """
    chosen, *others = shared_sets(folders, set_name)
    runs = read_runs(folders, set_name=chosen, metric=metric, ignore=ignore)
    groups = _grouped(runs)
    paths_of = dict.fromkeys(path for group in groups for path in group.settings)
    values = {path: tuple(group.settings.get(path, ABSENT) for group in groups) for path in paths_of}
    names = dict.fromkeys([metric, *(name for run in runs for row in run.metrics for name in row.values)])
    return Comparison(
        set_name=chosen,
        other_sets=tuple(others),
        metric=metric,
        metrics=tuple(names),
        groups=groups,
        differences={path: found for path, found in values.items() if any(value != found[0] for value in found)},
        intervals=tuple(_interval(groups[0], group, resamples, seed) for group in groups[1:]),
    )


def _grouped(runs: Sequence[ComparedRun]) -> tuple[Group, ...]:
    groups: list[list[ComparedRun]] = []
    for run in runs:
        same = next((group for group in groups if group[0].settings == run.settings), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    names = [group[0].config_name for group in groups]
    folders = [group[0].folder.name for group in groups]
    labels = names if len(set(names)) == len(names) else folders
    if len(set(labels)) < len(labels):
        labels = [str(group[0].folder) for group in groups]
    return tuple(Group(label=label, runs=tuple(group)) for label, group in zip(labels, groups, strict=True))


def _interval(first: Group, other: Group, resamples: int, seed: int) -> Interval | None:
    ours, theirs = first.results(), other.results()
    both = [index for index in ours if not math.isnan(ours[index]) and not math.isnan(theirs[index])]
    if not both:
        return None
    a, b = (np.array([results[index] for index in both]) for results in (ours, theirs))
    return paired_bootstrap(a, b, resamples=resamples, seed=seed)
