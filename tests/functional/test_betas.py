"""Schedules at the points that matter."""

from __future__ import annotations

import pytest

from distillkit.functional.betas import cosine, linear


@pytest.mark.parametrize("step", [0, 1, 40, 79, 80, 81, 280])
def test_kdrl_annealing(step: int) -> None:
    assert linear(step, 5e-3, 1e-3, 80) == pytest.approx(max(5e-3 - 5e-5 * step, 1e-3), rel=1e-12)


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize(("start", "end"), [(5e-3, 1e-3), (0.1, 0.7), (0.2, 0.002), (0.0, 1.0)])
def test_ends_are_exact_and_the_end_stays(schedule: object, start: float, end: float) -> None:
    at = [schedule(step, start, end, 80) for step in (0, 80, 81, 10_000)]  # type: ignore[operator]
    assert at == [start, end, end, end]


def test_cosine_is_slow_at_both_ends() -> None:
    assert [cosine(step, 1.0, 0.0, 80) for step in (20, 40, 60)] == pytest.approx([0.8535534, 0.5, 0.1464466])
