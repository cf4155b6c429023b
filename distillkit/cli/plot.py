"""`distillkit plot RUN...`: the curves of runs, from their `metrics.csv`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distillkit.errors import ConfigError, problem
from distillkit.reporting.drawing import INSTALL, can_draw
from distillkit.reporting.run_folder import RunFolder

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run `distillkit plot`; return the exit code.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: no metrics in a run folder, or they cannot be read.
    """
    options = _parser().parse_args(list(argv))
    if not can_draw():
        raise ConfigError(problem("distillkit plot: matplotlib is not installed", hint=INSTALL))
    from distillkit.reporting.plots import write_plots

    for run in (RunFolder(Path(folder)) for folder in options.runs):
        names = ", ".join(path.name for path in write_plots(run.metrics_csv, run.plots))
        print(f"{run.plots}: {names or 'nothing to draw yet'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit plot",
        description="Draw the curves of runs into their plots/, from metrics.csv alone: of a run that is still going, "
        "or that ran where matplotlib was not installed.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder")
    return parser
