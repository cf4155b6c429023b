"""Beta parts of the step alone, at the points that matter."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distillkit.betas.constant import Constant
from distillkit.betas.cosine import Cosine
from distillkit.betas.linear import Linear
from distillkit.betas.reward_progress import RewardProgress
from distillkit.betas.switch import Switch
from distillkit.components import BetaScheduler
from distillkit.errors import ConfigError

STEPS = (0, 1, 79, 80, 81)


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (Constant(value=0.02), [0.02] * 5),
        (Linear(start=5e-3, end=1e-3, steps=80), [5e-3, 4.95e-3, 1.05e-3, 1e-3, 1e-3]),
        (Linear(start=5e-3, end=1e-3, delta=5e-5), [5e-3, 4.95e-3, 1.05e-3, 1e-3, 1e-3]),
        (Linear(start=0.2, end=0.002, steps=120), [0.2, 0.19835, 0.06965, 0.068, 0.06635]),
        (Linear(start=0.0, end=1.0, delta=1 / 80), [0.0, 0.0125, 0.9875, 1.0, 1.0]),
        (Cosine(start=1.0, end=0.0, steps=80), [1.0, 0.9996145, 0.0003855, 0.0, 0.0]),
        (Switch(before=1.0, after=0.25, at=80), [1.0, 1.0, 1.0, 0.25, 0.25]),
        (Switch(before=1.0, after=0.25, at=1), [1.0, 0.25, 0.25, 0.25, 0.25]),
        (Switch(before=1.0, after=0.25, at=0), [0.25] * 5),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BetaScheduler) else "",
)
def test_values_around_the_end_of_kdrls_annealing(schedule: BetaScheduler, want: list[float]) -> None:
    got = [schedule.value(step, {"train/reward": 1.0, "train/divergence": 9.0}) for step in STEPS]
    assert got == pytest.approx(want, rel=1e-9, abs=1e-7)
    assert schedule.state_dict() == {}  # a pure function of the step: a resumed run needs nothing


def test_ends_are_exact() -> None:
    assert [Linear(start=5e-3, end=1e-3, delta=5e-5).value(step, {}) for step in (0, 81, 10**9)] == [5e-3, 1e-3, 1e-3]
    assert [Linear(start=5e-3, end=1e-3, steps=80).value(step, {}) for step in (0, 80, 10**9)] == [5e-3, 1e-3, 1e-3]
    assert Cosine(start=1.0, end=0.25, steps=80).value(40, {}) == pytest.approx(0.625)


NEVER_ENDS = "at least 1 rollout step and finite: the schedule would never end"


def slope(end: float) -> str:
    return f"above 0 and finite (it moves towards end, {end}): the schedule would never end"


@pytest.mark.parametrize(
    ("cls", "arguments", "name", "expected"),
    [
        (Linear, {"steps": 0}, "steps", NEVER_ENDS),
        (Linear, {"steps": -3}, "steps", NEVER_ENDS),
        (Linear, {"steps": math.inf}, "steps", NEVER_ENDS),
        (Linear, {"delta": 0.0, "steps": None}, "delta", slope(0.0)),
        (Linear, {"delta": -5e-5, "steps": None}, "delta", slope(0.0)),
        (Linear, {"delta": math.inf, "steps": None}, "delta", slope(0.0)),
        (Linear, {"delta": math.nan, "steps": None, "end": 2.0}, "delta", slope(2.0)),
        (Linear, {"start": math.nan}, "start", "a finite number"),
        (Linear, {"end": math.inf}, "end", "a finite number"),
        (Cosine, {"steps": 0}, "steps", NEVER_ENDS),
        (Cosine, {"steps": math.inf}, "steps", NEVER_ENDS),
        (Cosine, {"start": math.nan}, "start", "a finite number"),
        (Cosine, {"end": math.inf}, "end", "a finite number"),
    ],
)
def test_schedules_that_never_end_are_refused(
    cls: type[Linear] | type[Cosine], arguments: dict[str, Any], name: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        cls(**{"start": 1.0, "end": 0.0, "steps": 5, **arguments})
    assert str(error.value) == f"{cls.__name__}.{name}\n    got:      {arguments[name]}\n    expected: {expected}"


@pytest.mark.parametrize(
    ("arguments", "got"),
    [({}, "neither steps nor delta"), ({"steps": 80, "delta": 5e-5}, "steps 80 and delta 5e-05")],
)
def test_a_line_has_a_length_or_a_slope(arguments: dict[str, Any], got: str) -> None:
    with pytest.raises(ConfigError) as error:
        Linear(start=1.0, end=0.0, **arguments)
    assert str(error.value) == (
        f"Linear: a line needs its length or its slope\n    got:      {got}\n"
        "    expected: one of steps and delta\n    try:      steps: 80"
    )


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"at": -1}, "at", "a finite number of rollout steps, at least 0"),
        ({"at": math.inf}, "at", "a finite number of rollout steps, at least 0"),
        ({"before": math.nan}, "before", "a finite number"),
        ({"after": math.inf}, "after", "a finite number"),
    ],
)
def test_a_switch_that_never_comes_is_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        Switch(**{"before": 1.0, "after": 0.0, "at": 5, **arguments})
    assert str(error.value) == f"Switch.{name}\n    got:      {arguments[name]}\n    expected: {expected}"


def test_constant_must_be_finite() -> None:
    with pytest.raises(ConfigError) as error:
        Constant(value=float("nan"))
    assert str(error.value) == "Constant.value\n    got:      nan\n    expected: a finite number"


@pytest.mark.parametrize(
    ("schedule", "needed"),
    [
        (Constant(value=1.0), 0),
        (Linear(start=1.0, end=0.0, steps=80), 80),
        (Linear(start=5e-3, end=1e-3, delta=5e-5), 80),
        (Linear(start=0.0, end=1.0, delta=0.3), 4),
        (Linear(start=1.0, end=1.0, delta=0.3), 0),
        (Linear(start=1.0, end=0.0, delta=5e-324), None),
        (Cosine(start=1.0, end=0.0, steps=80), 80),
        (Switch(before=1.0, after=0.0, at=80), 81),
        (Switch(before=1.0, after=0.0, at=0), 0),
        (RewardProgress(start=1.0, end=0.0, high=1.0), None),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BetaScheduler) else str(x),
)
def test_the_steps_until_the_last_value(schedule: BetaScheduler, needed: int | None) -> None:
    assert schedule.steps_needed == needed
    if needed is not None:
        assert schedule.value(needed, {}) == schedule.value(10**6, {})
