"""The example's parts keep their slots' contracts and give numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from distillkit_example.few_words import FewWords
from distillkit_example.hellinger import Hellinger

from distillkit.errors import ConfigError
from distillkit.functional.power_divergence import power
from distillkit.testing import check
from distillkit.types import TokenScores


def scores(*probabilities: float) -> TokenScores:
    return TokenScores(logits=torch.tensor([probabilities]).log())


@pytest.mark.parametrize("part", [Hellinger(), Hellinger(scale=4.0), FewWords(), FewWords(limit=3)])
def test_parts_keep_the_contract(part: object) -> None:
    check(part)  # type: ignore[arg-type]


def test_hellinger_equals_the_sum_written_out() -> None:
    expected = ((0.5 - math.sqrt(0.5)) ** 2 + (math.sqrt(0.75) - math.sqrt(0.5)) ** 2) / 2
    value = Hellinger()(scores(0.5, 0.5), scores(0.25, 0.75))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert Hellinger(scale=3.0)(scores(0.5, 0.5), scores(0.25, 0.75)).item() == pytest.approx(3 * expected, rel=1e-6)


def test_hellinger_is_bounded_where_the_two_have_nothing_in_common() -> None:
    assert Hellinger()(scores(1.0, 0.0), scores(0.0, 1.0)).item() == pytest.approx(1.0, rel=1e-6)


def test_hellinger_is_a_member_of_the_power_family() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    value = Hellinger(scale=4.0)(TokenScores(logits=student), TokenScores(logits=teacher))
    torch.testing.assert_close(value, power(student, teacher, -0.5), rtol=1e-4, atol=1e-6)


def test_gradient_against_its_closed_form() -> None:
    """½ Σ (√q − √p)² = 1 − Σ √(p·q): the gradient in the student's log p is −½ √(p·q), through the softmax."""
    student = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -1.0]])
    value = Hellinger()(TokenScores(logits=student), TokenScores(logits=teacher))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    slope = -0.5 * (p * q).sqrt()
    torch.testing.assert_close(gradient, slope - p * slope.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_a_token_impossible_on_both_sides_counts_for_nothing() -> None:
    student = torch.tensor([[0.3, -torch.inf, 0.1]], requires_grad=True)
    value = Hellinger()(TokenScores(logits=student), TokenScores(logits=torch.tensor([[1.0, -torch.inf, 0.0]])))
    value.sum().backward()
    assert value.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scale_outside_its_range_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError) as error:
        Hellinger(scale=scale)
    assert str(error.value) == (
        f"model.divergence.scale\n    got:      {scale}\n    expected: above 0 and finite\n    try:      1.0"
    )


def test_few_words_counts_words() -> None:
    reward = FewWords(limit=4)
    assert [reward.value("w " * n) for n in (0, 4, 5, 8, 50)] == [0.0, 0.0, -0.25, -1.0, -1.0]
