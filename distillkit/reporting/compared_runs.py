"""What `distillkit compare` reads of a run: its settings, its curves, and each problem's result."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distillkit import registry
from distillkit.errors import ConfigError, DataError, did_you_mean, problem
from distillkit.evaluation.metrics import (
    CompletionLength,
    FormatRate,
    MajAtK,
    MeanAtK,
    PassAtK,
    ProblemMean,
    TruncationRate,
    Unscored,
)
from distillkit.evaluation.results import ProblemResult, read_results
from distillkit.reporting.metrics import MetricsRow, read_metrics
from distillkit.reporting.run_folder import RunFolder

__all__ = ["ABSENT", "APART", "ComparedRun", "flatten", "read_runs", "shared_sets"]

ABSENT = "-"
"""The value of a setting that a config does not have."""

APART = ("seed_everything", "run_dir")
"""Settings that are told of each run, and are no difference."""

_PLAIN: Mapping[str, type[ProblemMean]] = {
    "format": FormatRate,
    "truncated": TruncationRate,
    "length": CompletionLength,
    "unscored": Unscored,
}


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run: its settings by dotted path, its curves, and the result of each problem at its last evaluation.

    `settings` leave out what is told apart; `step` is that of the last evaluation, `last_step` the last one taken;
    `metrics` are the rows of `metrics.csv`, the names of the evaluation set without `val/<set>/`; `results` hold NaN
    for a problem that nothing is known of.
    """

    folder: Path
    config_name: str
    state: str
    seed: Any
    settings: Mapping[str, Any]
    metrics: Sequence[MetricsRow]
    step: int
    last_step: int
    results: Mapping[int, float]
    problems: Mapping[int, str]

    def curve(self, metric: str) -> dict[int, float]:
        """Return step -> value of a metric of the evaluation set, where it is finite."""
        found = {row.step: row.values.get(metric, math.nan) for row in self.metrics}
        return {step: value for step, value in found.items() if math.isfinite(value)}


def read_runs(
    folders: Sequence[str | Path], *, set_name: str, metric: str, ignore: Sequence[str] = ()
) -> tuple[ComparedRun, ...]:
    """Read runs that were evaluated on the same problems.

    Args:
        folders: of the runs.
        set_name: evaluation set, one of `shared_sets`.
        metric: whose results are wanted, problem by problem.
        ignore: dotted paths that make no difference.

    Raises:
        ConfigError: no such metric.
        DataError: a file that cannot be read, or evaluations on different problems.
    """
    measure = _measure(metric)
    runs = tuple(_read(RunFolder(Path(folder)), set_name, metric, measure, ignore) for folder in folders)
    for run in runs[1:]:
        _check_problems(runs[0], run, set_name)
    return runs


def shared_sets(folders: Sequence[str | Path], asked: str | None = None) -> tuple[str, ...]:
    """Return the evaluation sets that all runs have results on, `asked` in front, then in the order of `data.val`.

    The order is that of the first run's config; sets that it does not name follow by name.

    Raises:
        ConfigError: no runs, not a run folder, given twice, without an evaluation, no common set.
        DataError: a config that cannot be read.
    """
    if not folders:
        raise ConfigError(problem("compare: no runs", expected="run folders"))
    runs = [_open(Path(folder)) for folder in folders]
    paths = [run.path.resolve() for run in runs]
    if twice := next((run.path for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1), None):
        raise ConfigError(problem(f"{twice}: given twice", expected="each run once"))
    return _choose_set(runs, asked)


def flatten(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of a canonical config; a part is its short name, with its arguments beneath.

    Example:
        >>> dict(flatten({"beta": {"class_path": "distillkit.betas.constant.Constant", "init_args": {"value": 0.2}}}))
        {'beta': 'constant', 'beta.value': 0.2}
    """
    if isinstance(config, Mapping) and "class_path" in config:
        names = {entry.class_path: entry.name for entry in registry.entries()}
        yield path, names.get(config["class_path"], config["class_path"])
        yield from flatten({k: v for k, v in config.items() if k not in ("class_path", "init_args")}, path)
        yield from flatten(config.get("init_args") or {}, path)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list) and config:
        for i, value in enumerate(config):
            yield from flatten(value, f"{path}[{i}]")
    else:
        yield path, config


def _open(path: Path) -> RunFolder:
    run = RunFolder(path)
    if not run.config_yaml.is_file() or run.status() is None:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = None if path.is_dir() else did_you_mean(path.name, siblings)
        raise ConfigError(
            problem(
                f"{path}: not a run folder",
                got="no config.yaml or status.json in it" if path.is_dir() else "no such folder",
                expected="what distillkit fit leaves, such as runs/quickstart",
                hint=str(path.parent / near) if near else None,
            )
        )
    if not _sets(run):
        status = run.status()
        raise ConfigError(
            problem(
                f"{path}: no evaluation in it",
                got=f"a {status.command} run that is {status.state}" if status else None,
                expected="eval/<set>.jsonl",
                hint="wait for its first validation, or run it with data.val",
            )
        )
    return run


def _sets(run: RunFolder) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in run.eval.glob("*.jsonl")))


def _choose_set(runs: Sequence[RunFolder], asked: str | None) -> tuple[str, ...]:
    found = dict.fromkeys([*_named_sets(_config(runs[0])), *_sets(runs[0])])
    shared = [name for name in found if all(name in _sets(run) for run in runs)]
    if asked is not None and asked not in shared:
        without = next((run for run in runs if asked not in _sets(run)), runs[0])
        where = f"{without.path}: no results on the evaluation set {asked!r}"
        near = did_you_mean(asked, shared)
        hint = f"--set {near}" if near else None
        raise ConfigError(problem(where, got=", ".join(_sets(without)), expected=asked, hint=hint))
    if not shared:
        each = "; ".join(f"{run.path}: {', '.join(_sets(run))}" for run in runs)
        raise ConfigError(problem("the runs share no evaluation set", got=each, expected="a set that all of them have"))
    chosen = asked if asked is not None else shared[0]
    return (chosen, *(name for name in shared if name != chosen))


def _named_sets(config: Any) -> list[str]:
    """The names of `data.val`, in its order; none where another data module has no such thing."""
    data = config.get("data") if isinstance(config, Mapping) else None
    data = data.get("init_args", data) if isinstance(data, Mapping) else None
    given = data.get("val") if isinstance(data, Mapping) else None
    return [str(s["name"]) for s in given if isinstance(s, Mapping) and "name" in s] if isinstance(given, list) else []


def _measure(metric: str) -> ProblemMean:
    if metric in _PLAIN:
        return _PLAIN[metric]()
    if match := re.fullmatch(r"(pass|mean|maj)@([1-9]\d*)", metric):
        return PassAtK(int(match[2])) if match[1] == "pass" else MeanAtK() if match[1] == "mean" else MajAtK()
    known = f"pass@<k>, mean@<k>, maj@<k>, {', '.join(_PLAIN)}"
    raise ConfigError(problem("--metric: no such metric", got=metric, expected=known))


def _read(run: RunFolder, set_name: str, metric: str, measure: ProblemMean, ignore: Sequence[str]) -> ComparedRun:
    status = run.status()
    assert status is not None
    flat = dict(flatten(_config(run)))
    prefix = f"val/{set_name}/"
    logged_rows = read_metrics(run.metrics_csv)
    rows = [
        MetricsRow(step=r.step, values={n.removeprefix(prefix): v for n, v in r.values.items() if n.startswith(prefix)})
        for r in logged_rows
    ]
    logged = dict.fromkeys(name for row in rows for name in row.values)
    evaluated = {row.step for row in rows if math.isfinite(row.values.get(metric, math.nan))}
    step, results = _last_results(run.eval / f"{set_name}.jsonl", evaluated)
    if step is None:
        what = f"{run.path}: no {metric} on the evaluation set {set_name!r}"
        near = did_you_mean(metric, logged)
        hint = f"--metric {near}" if near and metric not in logged else None
        raise ConfigError(problem(what, got=", ".join(logged) or "nothing logged", expected=metric, hint=hint))
    measured = {result.index: measure.measure(result) for result in results}
    free = (*APART, *ignore)
    return ComparedRun(
        folder=run.path,
        config_name=status.config_name,
        state=status.state,
        seed=flat.get("seed_everything", ABSENT),
        settings={path: value for path, value in flat.items() if not _within(path, free)},
        metrics=[row for row in rows if row.values],
        step=step,
        last_step=logged_rows[-1].step,
        results={index: value / weight if weight else math.nan for index, (value, weight) in measured.items()},
        problems={result.index: _identity(result) for result in results},
    )


def _config(run: RunFolder) -> Any:
    try:
        return yaml.safe_load(run.config_yaml.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        got = " ".join(str(error).split())
        raise DataError(
            problem(f"{run.config_yaml}: cannot be read", got=got, expected="a canonical config")
        ) from error


def _last_results(file: Path, evaluated: set[int]) -> tuple[int | None, list[ProblemResult]]:
    """The newest step that both `metrics.csv` and the file of results have, and its results."""
    step: int | None = None
    results: list[ProblemResult] = []
    try:
        for found, result in read_results(file):
            if found in evaluated:
                if found != step:
                    step, results = found, []
                results.append(result)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        got = f"{type(error).__name__}: {error}"
        raise DataError(problem(f"{file}: not a file of evaluation results", got=got)) from error
    return step, results


def _identity(result: ProblemResult) -> str:
    return json.dumps([result.prompt, result.gold], sort_keys=True, default=str)


def _within(path: str, free: Sequence[str]) -> bool:
    return any(path == f or path.startswith((f"{f}.", f"{f}[")) for f in free)


def _check_problems(first: ComparedRun, other: ComparedRun, set_name: str) -> None:
    if first.problems == other.problems:
        return
    missing = sorted(first.problems.keys() - other.problems.keys())
    more = sorted(other.problems.keys() - first.problems.keys())
    changed = sorted(i for i in first.problems.keys() & other.problems.keys() if first.problems[i] != other.problems[i])
    parts = [f"{len(other.problems)} problems"]
    parts += [f"{len(indices)} {what}" for indices, what in ((missing, "missing"), (more, "more")) if indices]
    if changed:
        parts.append(f"{len(changed)} with another prompt or gold answer, the first with index {changed[0]}")
    where = f"{other.folder}: evaluated on other problems than {first.folder} (set {set_name!r})"
    hint = "--set of a set that all runs share, or distillkit validate with the same data.val"
    raise DataError(
        problem(where, got=", ".join(parts), expected=f"the same {len(first.problems)} problems", hint=hint)
    )
