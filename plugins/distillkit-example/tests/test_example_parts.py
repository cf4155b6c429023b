"""The example's parts keep their slots' contracts and give numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from distillkit_example.few_words import FewWords
from distillkit_example.skew import SkewReverseKL

from distillkit.errors import ConfigError
from distillkit.functional.divergences import reverse_kl
from distillkit.testing import check
from distillkit.types import TokenScores


def scores(*probabilities: float) -> TokenScores:
    return TokenScores(logits=torch.tensor([probabilities]).log())


@pytest.mark.parametrize("part", [SkewReverseKL(), SkewReverseKL(alpha=0.5), FewWords(), FewWords(limit=3)])
def test_parts_keep_the_contract(part: object) -> None:
    check(part)  # type: ignore[arg-type]


def test_skew_reverse_kl_equals_the_sum_written_out() -> None:
    # m = 0.8·(0.25, 0.75) + 0.2·(0.5, 0.5) = (0.3, 0.7)
    expected = 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)
    value = SkewReverseKL(alpha=0.2)(scores(0.5, 0.5), scores(0.25, 0.75))
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_skew_reverse_kl_is_bounded_where_the_teacher_gives_no_mass() -> None:
    value = SkewReverseKL(alpha=0.1)(scores(1.0, 0.0), scores(0.0, 1.0))
    assert value.item() == pytest.approx(-math.log(0.1), rel=1e-6)


def test_skew_reverse_kl_tends_to_the_reverse_kl() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    value = SkewReverseKL(alpha=1e-6)(TokenScores(logits=student), TokenScores(logits=teacher))
    torch.testing.assert_close(value, reverse_kl(student, teacher), rtol=1e-4, atol=1e-6)


def test_the_gradient_passes_through_both_sides_of_the_ratio() -> None:
    student = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -1.0]])
    (gradient,) = torch.autograd.grad(
        SkewReverseKL(alpha=0.3)(TokenScores(logits=student), TokenScores(logits=teacher)).sum(), student
    )
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    m = 0.7 * q + 0.3 * p
    slope = (p / m).log() + 1 - 0.3 * p / m  # d/dp of p·log(p/m), m moving with p
    torch.testing.assert_close(gradient, p * (slope - (p * slope).sum(-1, keepdim=True)))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.divergence\.alpha"):
        SkewReverseKL(alpha=alpha)


def test_few_words_counts_words() -> None:
    reward = FewWords(limit=4)
    assert [reward.value("w " * n) for n in (0, 4, 5, 8, 50)] == [0.0, 0.0, -0.25, -1.0, -1.0]
