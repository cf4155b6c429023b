"""Schedules at the points that matter."""

from __future__ import annotations

import pytest

from distillkit.functional.betas import annealed, cosine, linear, progress, proportional


@pytest.mark.parametrize("step", [0, 1, 40, 79, 80, 81, 280])
def test_kdrl_annealing(step: int) -> None:
    want = max(5e-3 - 5e-5 * step, 1e-3)
    assert linear(step, 5e-3, 1e-3, 80) == pytest.approx(want, rel=1e-12)
    assert annealed(step, 5e-3, 1e-3, 5e-5) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize(("start", "end"), [(5e-3, 1e-3), (0.1, 0.7), (0.2, 0.002), (0.0, 1.0)])
def test_ends_are_exact_and_the_end_stays(schedule: object, start: float, end: float) -> None:
    at = [schedule(step, start, end, 80) for step in (0, 80, 81, 10_000)]  # type: ignore[operator]
    assert at == [start, end, end, end]


def test_cosine_is_slow_at_both_ends() -> None:
    assert [cosine(step, 1.0, 0.0, 80) for step in (20, 40, 60)] == pytest.approx([0.8535534, 0.5, 0.1464466])


def test_annealing_goes_either_way_and_stops_exactly_at_its_end() -> None:
    assert [annealed(step, 1.0, 0.25, 0.5) for step in (0, 1, 2, 10**9)] == [1.0, 0.5, 0.25, 0.25]
    assert [annealed(step, 0.25, 1.0, 0.5) for step in (0, 1, 2, 10**9)] == [0.25, 0.75, 1.0, 1.0]
    assert annealed(5, 0.3, 0.3, 0.1) == 0.3


@pytest.mark.parametrize(
    ("measured", "want"), [(1.0, 2.0), (1.5, 2.2), (1.1, 2.1), (0.9, 1.9), (0.5, 1.8), (0.0, 1.8), (-9.0, 1.8)]
)
def test_the_controller_moves_by_the_clipped_relative_error(measured: float, want: float) -> None:
    assert proportional(2.0, measured, target=1.0, gain=0.5, limit=0.2) == pytest.approx(want, rel=1e-12)


def test_progress_is_a_share_of_the_way() -> None:
    assert [progress(v, 0.2, 0.6) for v in (-1.0, 0.2, 0.3, 0.6, 5.0)] == pytest.approx([0.0, 0.0, 0.25, 1.0, 1.0])
    assert progress(0.1, 0.7, 0.7) == 1.0
