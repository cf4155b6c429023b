"""A comparison as text: the tables that the screen and `compare.md` both show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from distillkit.reporting.compare import Comparison, Group, Spread
from distillkit.reporting.compared_runs import ABSENT
from distillkit.reporting.screen import printable, shorten

__all__ = ["Section", "aligned", "markdown", "sections"]

_LONGEST = 60
"""Characters of a setting's value that are shown."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table with a title; `notes` say what its numbers mean."""

    title: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def sections(comparison: Comparison) -> list[Section]:
    """Return the tables of a comparison: runs, configs, results, differences."""
    return [_runs(comparison), _configs(comparison), _results(comparison), _intervals(comparison)]


def aligned(section: Section) -> list[str]:
    """Return the lines of a section for a screen, without its title.

    Example:
        >>> aligned(Section(title="t", header=("name", "n"), rows=(("a", "10"), ("long name", "9"))))
        ['  name       n', '  a          10', '  long name  9']
    """
    table = [section.header, *section.rows] if section.rows else []
    widths = [max(len(row[i]) for row in table) for i in range(len(section.header))] if table else []
    lines = ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return [*lines, *(f"  {note}" for note in section.notes)]


def markdown(comparison: Comparison, plot: str | None) -> str:
    """Return `compare.md`; `plot` is the name of the picture beside it, if there is one."""
    blocks = [f"# {' · '.join(group.label for group in comparison.groups)}"]
    for section in sections(comparison):
        blocks.append(f"## {section.title}")
        if section.rows:
            rows = [section.header, ("---",) * len(section.header), *section.rows]
            blocks.append("\n".join("| " + " | ".join(_cell(c) for c in row) + " |" for row in rows))
        if section.notes:
            blocks.append("\n".join(section.notes))
    if plot is not None:
        blocks.append(f"![{comparison.metric} on {comparison.set_name} by step]({plot})")
    return "\n\n".join(blocks) + "\n"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _runs(comparison: Comparison) -> Section:
    rows = [
        (str(run.folder), group.label, str(run.seed), run.state, str(run.step))
        for group in comparison.groups
        for run in group.runs
    ]
    open_ends = [str(run.folder) for run in comparison.runs if run.state != "finished"]
    notes = [f"Not finished: {', '.join(open_ends)}; the last evaluation so far is taken."] if open_ends else []
    early = [
        f"{run.folder} (step {run.step} of {run.last_step})" for run in comparison.runs if run.step < run.last_step
    ]
    if early:
        notes.append(f"Trained on after the last evaluation: {', '.join(early)}; the results are not the final ones.")
    header = ("run", "group", "seed", "state", "last evaluation")
    return Section(title="Runs", header=header, rows=tuple(rows), notes=tuple(notes))


def _configs(comparison: Comparison) -> Section:
    title = "What differs in the configs"
    if len(comparison.groups) == 1:
        alone = "One run: nothing to compare it with."
        return Section(title=title, notes=(alone if len(comparison.runs) == 1 else "Nothing but the seed.",))
    header = ("setting", *(group.label for group in comparison.groups))
    rows = [(path, *map(_value, values)) for path, values in comparison.differences.items()]
    return Section(title=title, header=header, rows=tuple(rows), notes=(f"{ABSENT}: the config has no such setting.",))


def _results(comparison: Comparison) -> Section:
    metric, others = comparison.metric, comparison.metrics[1:]
    rows = [
        (
            group.label,
            str(len(group.runs)),
            _steps(group),
            _spread(group.final(metric)),
            _spread(group.best(metric)),
            *(_spread(group.final(name)) for name in others),
        )
        for group in comparison.groups
    ]
    notes = ["Mean ± sample standard deviation over the runs of a group, each at its own last evaluation."]
    notes += [
        f"Best {metric}: at each run's best evaluation, chosen on these very problems and so too good to be true."
    ]
    if len({run.step for run in comparison.runs}) > 1:
        steps = ", ".join(f"{group.label} {_steps(group)}" for group in comparison.groups)
        notes.append(f"Evaluated at different steps: {steps}.")
    if comparison.other_sets:
        notes.append(f"Other evaluation sets: {', '.join(comparison.other_sets)} (--set).")
    header = ("group", "runs", "step", metric, f"best {metric}", *others)
    return Section(title=f"Results on {comparison.set_name}", header=header, rows=tuple(rows), notes=tuple(notes))


def _intervals(comparison: Comparison) -> Section:
    first, *rest = comparison.groups
    title = f"{comparison.metric} against {first.label}"
    if not rest:
        return Section(title=title, notes=("No other group.",))
    rows = []
    for group, found in zip(rest, comparison.intervals, strict=True):
        if found is None:
            rows.append((group.label, ABSENT, ABSENT, "0", "no problem is known to both"))
            continue
        verdict = "yes" if found.excludes_zero else "no"
        rows.append(
            (
                group.label,
                f"{found.estimate:+.4g}",
                f"{found.low:+.4g} to {found.high:+.4g}",
                str(found.problems),
                verdict,
            )
        )
    level = next((f"{100 * found.level:g} %" for found in comparison.intervals if found is not None), "95 %")
    notes = (
        f"Group minus {first.label}: paired bootstrap over problems, each with the mean of its group's seeds and "
        "completions.",
        "The interval is for the choice of problems; how much another seed changes is the standard deviation above.",
    )
    return Section(
        title=title,
        header=("group", "difference", f"{level} interval", "problems", "without 0"),
        rows=tuple(rows),
        notes=notes,
    )


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return printable(shorten(text, _LONGEST)).replace("\n", "\\n")


def _steps(group: Group) -> str:
    steps = sorted({run.step for run in group.runs})
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ABSENT
    digits = 3 if abs(spread.mean) < 10 else 1
    text = f"{spread.mean:.{digits}f}"
    return text if spread.deviation is None else f"{text} ± {spread.deviation:.{digits}f}"
