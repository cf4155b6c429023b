"""Ratios and clipped losses, by hand and against the facts derived from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.functional.objectives import (
    ClampGradient,
    clipped_policy_loss,
    dual_clip,
    importance_weights,
    trrd_log_ratio,
)

MODES: tuple[ClampGradient, ...] = ("differentiable", "through", "detached")


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -2.56, 0.0),  # above, good: the clip binds
        (0.5, 2.0, -1.0, -1.0),  # below, good: still pulled up
        (1.5, -2.0, 3.0, 3.0),  # above, bad: pushed down without limit
        (0.5, -2.0, 1.6, 0.0),  # below, bad: the clip binds
        (1.1, 2.0, -2.2, -2.2),  # inside: d loss / d log r = -r·Â
        (0.9, -2.0, 1.8, 1.8),
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_ratio = number(math.log(ratio))
    value = clipped_policy_loss(log_ratio, torch.tensor(advantage, dtype=torch.float64), clip_low=0.2, clip_high=0.28)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(value, log_ratio)[0].item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.28), (0.0, 0.0)])
def test_a_ratio_that_overflows_costs_nothing_where_it_does_not_count(advantage: float, loss: float) -> None:
    log_ratio = torch.tensor([200.0, 0.1], requires_grad=True)
    value = clipped_policy_loss(log_ratio, torch.full((2,), advantage), 0.2, 0.28)
    assert value[0].item() == pytest.approx(loss)
    (gradient,) = torch.autograd.grad(value.sum(), log_ratio)
    assert gradient[0] == 0 and gradient.isfinite().all()
    # A bad token that grew beyond all measure is no number: the update it would make is dropped and counted.
    assert clipped_policy_loss(log_ratio, torch.full((2,), -1.0), 0.2, 0.28)[0].isinf()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (9.0, -1.0, 3.0, 0.0),  # capped at 3·|Â|
        (2.0, -1.0, 2.0, 2.0),
        (0.5, -1.0, 0.8, 0.0),  # the lower clip already bound
        (9.0, 1.0, -1.28, 0.0),  # a good token is none of its business
        (0.01, 1.0, -0.01, -0.01),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_ratio, advantages = number(math.log(ratio)), torch.tensor(advantage, dtype=torch.float64)
    value = dual_clip(clipped_policy_loss(log_ratio, advantages, 0.2, 0.28), advantages, bound=3.0)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(value, log_ratio)[0].item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("teacher", [-1.3, -4.0, -0.2])
def test_gradient_of_the_trrd_ratio(mode: ClampGradient, teacher: float) -> None:
    """∇r = factor·r·∇log π_θ: 1 inside the clamp, where it binds α (plain) or 1 (through), α throughout (detached)."""
    alpha, old = 0.3, torch.tensor(-1.0, dtype=torch.float64)
    student = number(-1.5)
    ratio = trrd_log_ratio(student, old, torch.tensor(teacher, dtype=torch.float64), alpha, 1.0, mode).exp()
    gap = min(max(-1.5 - teacher, -1.0), 1.0)
    assert ratio.item() == pytest.approx(math.exp(alpha * -0.5 + (1 - alpha) * gap), rel=1e-12)
    binds = abs(-1.5 - teacher) > 1
    factor = {"differentiable": alpha if binds else 1.0, "through": 1.0, "detached": alpha}[mode]
    assert torch.autograd.grad(ratio, student)[0].item() == pytest.approx(factor * ratio.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("advantage", "student_over_teacher", "learns"),
    [(1.0, 1.63, True), (1.0, 1.64, False), (-1.0, 1 / 1.56, True), (-1.0, 1 / 1.57, False)],
)
def test_clip_is_active_on_the_first_step(advantage: float, student_over_teacher: float, learns: bool) -> None:
    """On-policy, α = ½, clip [0.8, 1.28]: zero gradient beyond π_S/π_T = 1.28² and π_T/π_S = 0.8⁻²."""
    student = number(-1.0)
    teacher = student.detach() - math.log(student_over_teacher)
    log_ratio = trrd_log_ratio(student, student.detach(), teacher, 0.5)
    loss = clipped_policy_loss(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.2, 0.28)
    assert (torch.autograd.grad(loss, student)[0].item() != 0) == learns


def test_clamp_bounds_the_ratio_on_policy() -> None:
    student = torch.linspace(-20, 0, 41, dtype=torch.float64)
    teacher = torch.linspace(0, -20, 41, dtype=torch.float64)
    ratio = trrd_log_ratio(student, student, teacher, 0.5).exp()
    assert ratio.min().item() == pytest.approx(0.6065, abs=1e-4)
    assert ratio.max().item() == pytest.approx(1.6487, abs=1e-4)
    unbounded = trrd_log_ratio(student, student, teacher, 0.5, clamp=None)
    assert unbounded.max().item() == pytest.approx(10.0)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_one_is_the_policy_ratio_bit_for_bit(mode: ClampGradient) -> None:
    generator = torch.Generator().manual_seed(0)
    student = (-5 * torch.rand(1000, generator=generator)).requires_grad_()
    old, teacher = -5 * torch.rand(1000, generator=generator), -9 * torch.rand(1000, generator=generator)
    ours, plain = trrd_log_ratio(student, old, teacher, 1.0, 1.0, mode), student - old
    assert torch.equal(ours, plain)
    upstream = torch.randn(1000, generator=generator)
    assert torch.equal(*(torch.autograd.grad(x, student, upstream)[0] for x in (ours, plain)))


@pytest.mark.parametrize("mode", ["differentiable", "through"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_teacher_equal_to_old_is_the_policy_ratio_for_every_alpha(mode: ClampGradient, alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old = -5 * torch.rand(1000, generator=generator)
    student = (old + 0.9 * (2 * torch.rand(1000, generator=generator) - 1)).requires_grad_()  # the clamp does not bind
    ours = trrd_log_ratio(student, old, old, alpha, 1.0, mode)
    torch.testing.assert_close(ours, student - old, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    torch.testing.assert_close(gradient, torch.ones(1000), rtol=0, atol=1e-6)


def test_teachers_temperature_has_its_own_student_logprobs() -> None:
    sampled, distil = number(-2.0), number(-1.0)
    old, teacher = torch.tensor(-2.5, dtype=torch.float64), torch.tensor(-1.4, dtype=torch.float64)
    log_ratio = trrd_log_ratio(sampled, old, teacher, 0.25, distil_logprobs=distil)
    assert log_ratio.item() == pytest.approx(0.25 * 0.5 + 0.75 * 0.4)
    assert [g.item() for g in torch.autograd.grad(log_ratio, (sampled, distil))] == [0.25, 0.75]


def test_unknown_clamp_gradient_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        trrd_log_ratio(*(torch.zeros(1),) * 3, 0.5, 1.0, "straight")  # type: ignore[arg-type]
    assert str(error.value) == (
        "trrd_log_ratio: clamp_grad\n    got:      'straight'\n    expected: differentiable, through or detached"
    )


def test_importance_weights_are_truncated_detached_and_one_where_unknown() -> None:
    old = torch.tensor([-1.0, -1.0, -3.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -3.0, -1.0, torch.nan])
    got = importance_weights(old, behaviour, cap=2.0)
    assert got.tolist() == pytest.approx([1.0, 2.0, math.exp(-2), 1.0])
    assert not got.requires_grad
