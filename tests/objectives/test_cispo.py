"""CISPO: a clipped weight, and a gradient for every token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.objectives.cispo import CISPO
from distillkit.objectives.grpo import GRPO
from distillkit.types import StudentScores


def scores(log_ratio: Tensor) -> tuple[StudentScores, Tensor]:
    old = torch.full_like(log_ratio, -1.5)
    logprobs = (old + log_ratio).requires_grad_()
    mask = torch.ones(log_ratio.shape, dtype=torch.bool)
    return StudentScores(loss_mask=mask, logprobs=logprobs, distil_logprobs=logprobs), old


RATIOS = torch.tensor([[1e-4, 0.5, 0.9, 1.0, 1.4, 2.0, 50.0]], dtype=torch.float64)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("bounds", "weights"),
    [
        ({}, [1e-4, 0.5, 0.9, 1.0, 1.4, 2.0, 5.0]),
        ({"clip_high": 0.28}, [1e-4, 0.5, 0.9, 1.0, 1.28, 1.28, 1.28]),
        ({"clip_low": 0.2, "clip_high": 0.28}, [0.8, 0.8, 0.9, 1.0, 1.28, 1.28, 1.28]),
    ],
    ids=str,
)
def test_gradient_is_the_clipped_weight_times_the_advantage(
    bounds: dict[str, Any], weights: list[float], advantage: float
) -> None:
    """∂/∂log π_θ of −sg[clip(r)]·Â·log π_θ is −clip(r)·Â: no token has none, whatever its ratio and sign."""
    student, old = scores(RATIOS.log())
    loss = CISPO(**bounds).loss(student, old, None, torch.full_like(RATIOS, advantage))
    assert loss[0].tolist() == pytest.approx(
        [-w * advantage * lp for w, lp in zip(weights, student.logprobs[0].tolist(), strict=True)], rel=1e-9
    )
    (gradient,) = torch.autograd.grad(loss.sum(), student.logprobs)
    assert gradient[0].tolist() == pytest.approx([-w * advantage for w in weights], rel=1e-9)
    assert (gradient != 0).all()


def test_grpo_takes_the_gradient_where_cispo_keeps_it() -> None:
    student, old = scores(RATIOS.log())
    advantages = torch.ones_like(RATIOS)
    plain = torch.autograd.grad(GRPO().loss(student, old, None, advantages).sum(), student.logprobs)[0]
    assert (plain[0, 4:] == 0).all()
    ours = torch.autograd.grad(CISPO().loss(student, old, None, advantages).sum(), student.logprobs)[0]
    torch.testing.assert_close(ours[0, :4], plain[0, :4])


def test_a_ratio_that_overflows_has_the_highest_weight() -> None:
    student, old = scores(torch.tensor([[200.0, -200.0]]))
    loss = CISPO(clip_low=0.5).loss(student, old, None, torch.tensor([[1.0, -1.0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), student.logprobs)
    assert gradient.tolist() == [[-5.0, 0.5]]


def test_a_token_without_an_advantage_learns_nothing() -> None:
    student, old = scores(RATIOS.log())
    loss = CISPO().loss(student, old, None, torch.zeros_like(RATIOS))
    assert (torch.autograd.grad(loss.sum(), student.logprobs)[0] == 0).all()


def test_shares_of_bounded_weights() -> None:
    student, old = scores(RATIOS.log())
    advantages = torch.tensor([[-1.0, 1.0, 1.0, 1.0, -1.0, 0.0, 1.0]], dtype=torch.float64)
    found = CISPO(clip_low=0.2, clip_high=0.28).diagnostics(student, old, None, advantages)
    assert found["clipped_low"].tolist() == [[1, 1, 0, 0, 0, 0, 0]]
    assert found["clipped_high"].tolist() == [[0, 0, 0, 0, 1, 0, 1]]
    torch.testing.assert_close(found["ratio"], RATIOS)


def test_defaults_have_no_lower_bound_and_a_token_mean() -> None:
    part = CISPO()
    assert (part.clip_low, part.clip_high, part.aggregation, part.std) == (1.0, 4.0, "token", True)


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"clip_low": 1.5}, "clip_low", "between 0 and 1"),
        ({"clip_high": math.nan}, "clip_high", "at least 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        CISPO(**arguments)
    assert str(error.value) == f"model.objective.{name}\n    got:      {arguments[name]}\n    expected: {expected}"


def test_a_schedule_that_leaves_the_range_is_refused() -> None:
    student, old = scores(RATIOS.log())
    with pytest.raises(ConfigError) as error:
        CISPO().at({"clip_low": 1.5}).loss(student, old, None, torch.ones_like(RATIOS))
    assert str(error.value) == ("model.schedules.objective.clip_low\n    got:      1.5\n    expected: between 0 and 1")
