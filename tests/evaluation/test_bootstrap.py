"""The paired bootstrap: cases worked by hand, what pairing does, and how often the truth is inside."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distillkit.errors import ConfigError, ShapeError
from distillkit.evaluation import Interval, paired_bootstrap


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    hard_and_easy = [0.0, 0.25, 0.5, 0.75]
    found = paired_bootstrap(hard_and_easy, [x + 0.125 for x in hard_and_easy], resamples=500)
    assert found == Interval(estimate=0.125, low=0.125, high=0.125, level=0.95, problems=4)
    assert found.excludes_zero
    same = paired_bootstrap(hard_and_easy, hard_and_easy)
    assert (same.estimate, same.low, same.high, same.excludes_zero) == (0.0, 0.0, 0.0, False)


def test_the_interval_is_that_of_all_resamples_of_three_problems() -> None:
    """Three problems have 27 equally likely resamples: their quantiles are exact."""
    difference = [-1.0, 0.0, 4.0]
    means = [float(np.mean(drawn)) for drawn in itertools.product(difference, repeat=3)]
    exact = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    found = paired_bootstrap([1.0, 1.0, 0.0], [0.0, 1.0, 4.0], resamples=20_000, level=0.8)
    assert found.estimate == 1.0
    assert (found.low, found.high) == pytest.approx(tuple(exact))


def test_pairing_matters() -> None:
    generator = np.random.default_rng(1)
    ability = generator.normal(size=200)
    a, b = ability + 0.01 * generator.normal(size=200), ability + 0.1 + 0.01 * generator.normal(size=200)
    paired = paired_bootstrap(a, b)
    assert paired.high - paired.low < 0.01
    assert paired.excludes_zero
    broken = paired_bootstrap(a, generator.permutation(b))
    assert broken.estimate == pytest.approx(paired.estimate)
    assert broken.high - broken.low > 0.3
    assert not broken.excludes_zero


def test_the_truth_is_inside_as_often_as_the_level_says() -> None:
    generator = np.random.default_rng(2)
    inside = 0
    for trial in range(400):
        a = (generator.random(150) < 0.5).astype(float)
        b = np.where(generator.random(150) < 0.3, (generator.random(150) < 0.7).astype(float), a)
        found = paired_bootstrap(a, b, resamples=400, seed=trial, level=0.9)
        inside += found.low <= 0.3 * (0.7 - 0.5) <= found.high
    assert 0.85 <= inside / 400 <= 0.95


def test_the_seed_decides_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    a, b = generator.random(50), generator.random(50)
    first = paired_bootstrap(a, b, resamples=1000, seed=5)
    assert paired_bootstrap(a, b, resamples=1000, seed=5) == first
    assert paired_bootstrap(a, b, resamples=1000, seed=6) != first
    monkeypatch.setattr("distillkit.evaluation.bootstrap._CELLS", 50 * 7)
    assert paired_bootstrap(a, b, resamples=1000, seed=5) == first


def test_swapping_the_groups_mirrors_the_interval() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.random(80), generator.random(80)
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (back.estimate, back.low, back.high) == pytest.approx((-there.estimate, -there.high, -there.low))


@pytest.mark.parametrize(
    ("a", "b", "more", "text"),
    [
        (
            [1.0],
            [1.0, 2.0],
            {},
            "paired_bootstrap: results\n    got:      shapes [1] and [2]\n"
            "    expected: one number per problem, in both",
        ),
        (
            [],
            [],
            {},
            "paired_bootstrap: results\n    got:      shapes [0] and [0]\n"
            "    expected: one number per problem, in both",
        ),
        (
            [1.0, 1.0],
            [1.0, float("nan")],
            {},
            "paired_bootstrap: problem 1\n    got:      a result that is not finite\n    expected: finite numbers",
        ),
        ([1.0], [1.0], {"resamples": 0}, "paired_bootstrap: resamples\n    got:      0\n    expected: at least 1"),
        ([1.0], [1.0], {"level": 1.0}, "paired_bootstrap: level\n    got:      1.0\n    expected: between 0 and 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: list[float], b: list[float], more: dict[str, float], text: str) -> None:
    with pytest.raises((ShapeError, ConfigError)) as caught:
        paired_bootstrap(a, b, **more)  # type: ignore[arg-type]
    assert str(caught.value) == text
