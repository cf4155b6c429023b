"""`distillkit compare RUN...`: configs, seeds, results and their uncertainty, beside each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distillkit.reporting.compare import Comparison, compare_runs
from distillkit.reporting.compare_report import aligned, markdown, sections
from distillkit.reporting.drawing import INSTALL, can_draw
from distillkit.reporting.run_folder import atomic_write_text
from distillkit.reporting.screen import say

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run `distillkit compare`; return the exit code.

    Raises:
        ConfigError: not a run folder, no evaluation in it, no common evaluation set, no such metric.
        DataError: a file that cannot be read, or evaluations on different problems.
    """
    options = _parser().parse_args(list(argv))
    comparison = compare_runs(options.runs, set_name=options.set, metric=options.metric, ignore=options.ignore)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console()
    for section in sections(comparison):
        say(console, section.title, style="bold")
        for line in aligned(section):
            say(console, line)
        say(console, "")
    page, plot = _write(comparison, Path(options.output))
    say(console, f"Written: {page}, {plot}" if plot else f"Written: {page}; for a picture of it: {INSTALL}")
    return 0


def _write(comparison: Comparison, folder: Path) -> tuple[Path, Path | None]:
    """Write `compare.md` and, where matplotlib is installed, `compare.png`; return where they are."""
    page, plot = folder / "compare.md", folder / "compare.png"
    if not can_draw():
        atomic_write_text(page, markdown(comparison, None))
        return page, None
    from distillkit.reporting.compare_plot import write_comparison_plot

    write_comparison_plot(comparison, plot)
    atomic_write_text(page, markdown(comparison, plot.name))
    return page, plot


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit compare",
        description="Compare runs: what differs in their configs, final results by group of seeds, and how sure the "
        "difference from the first group is. Runs that differ in nothing but the seed are one group.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder")
    parser.add_argument(
        "--set", metavar="NAME", help="evaluation set (default: the first of data.val that all runs have)"
    )
    parser.add_argument("--metric", default="pass@1", help="of the set, such as mean@8 or length (default: pass@1)")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="SETTING",
        help="a setting that makes no difference, such as model.student of runs that go on from others; repeatable",
    )
    parser.add_argument(
        "--output", default="compare", metavar="FOLDER", help="of compare.md and compare.png (default: compare)"
    )
    return parser
