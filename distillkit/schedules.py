"""Where schedules end, compared at start-up with where the run ends and with what the scheduled parts take."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping

from distillkit.components import BetaScheduler, Component
from distillkit.errors import ConfigError

__all__ = ["end_point_problems", "unfinished"]


def unfinished(schedules: Mapping[str, BetaScheduler], max_steps: int) -> list[str]:
    """Return one line per schedule that the run ends before; a run without a last step (-1) ends before none.

    Args:
        schedules: by YAML path.
        max_steps: `trainer.max_steps`.
    """
    if max_steps < 0:
        return []
    return [
        f"{path}: {type(schedule).__name__} needs {needed} steps to end, and trainer.max_steps is {max_steps}: "
        "the run ends first"
        for path, schedule in schedules.items()
        if (needed := schedule.steps_needed) is not None and needed > max_steps
    ]


def end_point_problems(parts: Mapping[str, Component], schedules: Mapping[str, BetaScheduler]) -> Iterator[str]:
    """Yield what a part's constructor says against the values that its schedules begin and end with.

    Only schedules that know their end are asked, and only parts that keep every constructor argument under its name.

    Args:
        parts: by their key under `model`.
        schedules: by `<key of the part>.<argument>`.
    """
    for key, part in parts.items():
        mine = {path.removeprefix(f"{key}."): s for path, s in schedules.items() if path.startswith(f"{key}.")}
        known = {name: (s, s.steps_needed) for name, s in mine.items() if s.steps_needed is not None}
        for step in sorted({0, *(needed for _, needed in known.values())}):
            values = {name: copy.deepcopy(schedule).value(step, {}) for name, (schedule, _) in known.items()}
            if text := _refusal(part, values):
                yield text.replace(f"model.{key}.", f"model.schedules.{key}.", 1)
                break


def _refusal(part: Component, values: Mapping[str, float]) -> str | None:
    """Make the part again, with other values; None where it takes them or cannot be made from its attributes."""
    arguments = {
        name: getattr(part, name, inspect.Parameter.empty) for name in inspect.signature(type(part)).parameters
    }
    changed = {name: value for name, value in values.items() if name in arguments}
    if not changed or inspect.Parameter.empty in arguments.values():
        return None
    try:
        type(part)(**arguments)
    except Exception:  # an attribute that is not the argument it was made of
        return None
    try:
        type(part)(**{**arguments, **changed})
    except ConfigError as error:
        return str(error)
    return None
