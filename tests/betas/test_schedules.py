"""Beta parts at the points that matter."""

from __future__ import annotations

import pytest

from distillkit.betas.constant import Constant
from distillkit.betas.cosine import Cosine
from distillkit.betas.linear import Linear
from distillkit.errors import ConfigError


def test_constant() -> None:
    assert [Constant(value=0.02).value(step, {"train/reward": 1.0}) for step in (0, 1, 10**6)] == [0.02] * 3


@pytest.mark.parametrize(("step", "want"), [(0, 5e-3), (1, 4.95e-3), (79, 1.05e-3), (80, 1e-3), (81, 1e-3)])
def test_linear_is_kdrl_annealing(step: int, want: float) -> None:
    assert Linear(start=5e-3, end=1e-3, steps=80).value(step, {}) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("step", "want"), [(0, 1.0), (1, 0.9996145), (40, 0.5), (79, 0.0003855), (80, 0.0), (81, 0.0)])
def test_cosine(step: int, want: float) -> None:
    assert Cosine(start=1.0, end=0.0, steps=80).value(step, {}) == pytest.approx(want, abs=1e-7)


def test_schedules_are_pure() -> None:
    assert Linear(start=1.0, end=0.0, steps=2).state_dict() == {}


@pytest.mark.parametrize("cls", [Linear, Cosine])
def test_bad_arguments_are_refused(cls: type[Linear] | type[Cosine]) -> None:
    for arguments, text in (
        ({"steps": 0}, "model.beta.steps\n    got:      0\n    expected: at least 1 rollout step"),
        ({"start": float("nan")}, "model.beta.start\n    got:      nan\n    expected: a finite number"),
        ({"end": float("inf")}, "model.beta.end\n    got:      inf\n    expected: a finite number"),
    ):
        with pytest.raises(ConfigError) as error:
            cls(**{"start": 1.0, "end": 0.0, "steps": 5, **arguments})  # type: ignore[arg-type]
        assert str(error.value) == text


def test_constant_must_be_finite() -> None:
    with pytest.raises(ConfigError) as error:
        Constant(value=float("nan"))
    assert str(error.value) == "model.beta.value\n    got:      nan\n    expected: a finite number"
