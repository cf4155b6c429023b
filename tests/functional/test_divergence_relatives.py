"""Skewed KLs, ToDi and the power family: closed forms, limits, and what the formulas say at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.functional.divergences import forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl, todi
from distillkit.functional.power_divergence import power

Divergence = Callable[[Tensor, Tensor], Tensor]

PARTS: dict[str, Divergence] = {
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "todi": todi,
    **{f"power {e}": partial(power, exponent=e) for e in (-2.5, -1.0, -0.7, -0.5, -0.2, 0.0, 2 / 3, 1.0, 2.0)},
}


def logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sides(rows: int = 20, vocabulary: int = 6, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student (a leaf) and teacher logits."""
    return logits(rows, vocabulary, seed=0, scale=scale).requires_grad_(), logits(rows, vocabulary, seed=1, scale=scale)


def gradient(value: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), student)[0]


def through_softmax(student: Tensor, slope: Tensor) -> Tensor:
    """∂/∂z from ∂/∂log π_θ: slope_v − π_θ(v)·Σ slope."""
    return slope - student.detach().softmax(-1) * slope.sum(-1, keepdim=True)


def by_hand(name: str, q: list[float], p: list[float]) -> float:
    """The formula over python floats; p is the teacher, q the student."""
    pairs = list(zip(p, q, strict=True))
    if name == "skew_forward_kl":
        return sum(a * math.log(a / (0.1 * a + 0.9 * b)) for a, b in pairs)
    if name == "skew_reverse_kl":
        return sum(b * math.log(b / (0.1 * b + 0.9 * a)) for a, b in pairs)
    if name == "todi":
        weight = [1 / (1 + b / a) for a, b in pairs]
        return sum(
            w * a * math.log(a / b) + (1 - w) * b * math.log(b / a) for w, (a, b) in zip(weight, pairs, strict=True)
        )
    e: float = float(name.split()[1])
    if e in (0.0, -1.0):
        return sum(a * math.log(a / b) if e == 0 else b * math.log(b / a) for a, b in pairs)
    return sum(a * (math.pow(a / b, e) - 1) for a, b in pairs) / (e * (e + 1))


@pytest.mark.parametrize("name", PARTS)
def test_values_against_the_formula(name: str) -> None:
    student, teacher = logits(4, 3, 5, seed=0), logits(4, 3, 5, seed=1)
    got = PARTS[name](student, teacher)
    assert got.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            want = by_hand(name, student[i, j].softmax(-1).tolist(), teacher[i, j].softmax(-1).tolist())
            assert float(got[i, j]) == pytest.approx(want, rel=1e-10)


def test_values_by_hand() -> None:
    """Teacher (¾, ¼), student (½, ½)."""
    student, teacher = (torch.tensor(side, dtype=torch.float64).log() for side in ([0.5, 0.5], [0.75, 0.25]))
    assert power(student, teacher, 1.0).item() == pytest.approx(0.5 * (0.25**2 + 0.25**2) / 0.5, rel=1e-6)
    assert power(student, teacher, -2.0).item() == pytest.approx(0.5 * (0.0625 / 0.75 + 0.0625 / 0.25), rel=1e-6)
    hellinger = 0.5 * ((math.sqrt(0.75) - math.sqrt(0.5)) ** 2 + (0.5 - math.sqrt(0.5)) ** 2)
    assert power(student, teacher, -0.5).item() == pytest.approx(4 * hellinger, rel=1e-6)
    assert todi(student, teacher).item() == pytest.approx(0.25 * math.log(1.5) + 0.25 * math.log(2), rel=1e-6)
    assert skew_reverse_kl(student, teacher, 0.2).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3), rel=1e-6
    )
    assert skew_forward_kl(student, teacher, 0.2).item() == pytest.approx(
        0.75 * math.log(0.75 / 0.55) + 0.25 * math.log(0.25 / 0.45), rel=1e-6
    )


@pytest.mark.parametrize("name", PARTS)
def test_zero_only_when_equal(name: str) -> None:
    student, teacher = logits(30, 6, seed=0), logits(30, 6, seed=1)
    assert PARTS[name](student, student + 3.0).abs().max() < 1e-14
    assert PARTS[name](student, teacher).min() > 1e-4


@pytest.mark.parametrize("name", [name for name in PARTS if name != "todi"])
def test_gradcheck(name: str) -> None:
    student, teacher = logits(3, 5, seed=0).requires_grad_(), logits(3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: PARTS[name](x, teacher), (student,))


def test_todis_value_is_the_jeffreys_divergence() -> None:
    student, teacher = sides(rows=200)
    jeffreys = forward_kl(student, teacher) + reverse_kl(student, teacher)
    torch.testing.assert_close(todi(student, teacher), jeffreys, rtol=1e-12, atol=1e-14)


def test_todis_gradient_against_autograd_with_the_weight_held() -> None:
    student, teacher = sides()
    p, q = teacher.softmax(-1), student.softmax(-1)
    weight = torch.sigmoid(p.log() - q.log()).detach()
    written_out = weight * p * (p / q).log() + (1 - weight) * q * (q / p).log()
    torch.testing.assert_close(
        gradient(todi(student, teacher), student), gradient(written_out, student), rtol=1e-10, atol=1e-13
    )


def test_todis_gradient_against_its_closed_form() -> None:
    """With a = p/(p+q) held: ∂/∂log q = −a·p + (1−a)·q·(log(q/p) + 1) = (q − p) + q²/(p+q)·log(q/p)."""
    student, teacher = sides()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    want = through_softmax(student, (q - p) + q**2 / (p + q) * (q / p).log())
    got = gradient(todi(student, teacher), student)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    jeffreys = gradient(forward_kl(student, teacher) + reverse_kl(student, teacher), student)
    assert (got - jeffreys).norm() / jeffreys.norm() > 0.05  # the weight is what makes ToDi ToDi


def test_todi_is_a_forward_kl_where_the_student_underrates_and_a_reverse_kl_where_it_overrates() -> None:
    student = torch.tensor([[-12.0, 12.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[12.0, -12.0, 0.0]], dtype=torch.float64)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    forward_only = -p[0, 0]  # ∂/∂log q of p·log(p/q), the term of the underrated token
    reverse_only = q[0, 1] * ((q / p).log()[0, 1] + 1)
    weight = torch.sigmoid(p.log() - q.log())
    slope = -weight * p + (1 - weight) * q * ((q / p).log() + 1)
    assert slope[0, 0].item() == pytest.approx(forward_only.item(), rel=1e-6)
    assert slope[0, 1].item() == pytest.approx(reverse_only.item(), rel=1e-6)
    torch.testing.assert_close(gradient(todi(student, teacher), student), through_softmax(student, slope))


@pytest.mark.parametrize("exponent", [-2.5, -1.3, -0.7, -0.5, -0.2, 0.3, 2 / 3, 1.0, 2.0])
def test_powers_gradient_against_its_closed_form(exponent: float) -> None:
    """D = (Σ p^{1+λ} q^{−λ} − 1)/(λ(λ+1)), so ∂/∂log q = −p^{1+λ} q^{−λ}/(λ+1)."""
    student, teacher = sides()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    want = through_softmax(student, -(p ** (1 + exponent)) * q ** (-exponent) / (1 + exponent))
    got = gradient(power(student, teacher, exponent), student)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("exponent", "limit"), [(0.0, forward_kl), (-1.0, reverse_kl)])
def test_powers_limits_are_the_kls_without_a_jump(exponent: float, limit: Divergence) -> None:
    student, teacher = sides(rows=50)
    exact, slope = limit(student, teacher), gradient(limit(student, teacher), student)
    assert torch.equal(power(student, teacher, exponent), exact)
    for off in (1e-3, 1e-5, 1e-7, 1e-9, 1e-12, 1e-15, 1e-25, 1e-300):
        for near in (exponent + off, exponent - off):
            value = power(student, teacher, near)
            tolerance = 40 * off + 1e-12  # the next order is λ·gap²/2, the gaps are below 15 nats
            torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(gradient(value, student), slope, rtol=20 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("exponent", [0.0, -1.0])
def test_powers_limits_hold_in_float32(exponent: float) -> None:
    student, teacher = (side.detach().float() for side in sides(rows=50))
    exact = power(student, teacher, exponent)
    for off in (1e-5, 1e-7, 1e-10, 1e-30):
        for near in (exponent + off, exponent - off):
            torch.testing.assert_close(power(student, teacher, near), exact, rtol=2e-4, atol=1e-6)


def test_power_does_not_jump_where_it_changes_sides() -> None:
    student, teacher = sides(rows=50)
    below, at, above = (power(student, teacher, -0.5 + off) for off in (-1e-9, 0.0, 1e-9))
    torch.testing.assert_close(below, at, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(above, at, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("exponent", [-3.0, -1.0, -0.8, -0.2, 0.0, 2 / 3, 1.5])
def test_powers_symmetry_turns_the_sides_round(exponent: float) -> None:
    student, teacher = (side.detach() for side in sides())
    torch.testing.assert_close(
        power(student, teacher, exponent), power(teacher, student, -1 - exponent), rtol=1e-10, atol=1e-12
    )


def test_power_at_minus_one_half_is_four_squared_hellinger_distances() -> None:
    student, teacher = (side.detach() for side in sides())
    overlap = (student.softmax(-1) * teacher.softmax(-1)).sqrt().sum(-1)
    torch.testing.assert_close(power(student, teacher, -0.5), 4 * (1 - overlap), rtol=1e-10, atol=1e-13)


def test_the_orientation_of_power_is_the_teacher_first() -> None:
    """A token that the teacher says and the student (nearly) never does: dear for λ > 0, cheap for λ < −1."""
    student, teacher = torch.tensor([0.999, 0.001]).log(), torch.tensor([0.5, 0.5]).log()
    assert power(student, teacher, 1.0) > 100 > power(student, teacher, -2.0)


def test_steep_terms_of_power_go_on_as_their_tangent() -> None:
    """At λ = 1 a term is p²/q; with p = ½ it passes e^30 where log q = −30 − 2·ln 2."""
    turn = 30 + 2 * math.log(2)

    def term(depth: float) -> tuple[float, float]:
        student = torch.tensor([[-depth, 0.0]], dtype=torch.float64, requires_grad=True)
        value = power(student, torch.zeros(1, 2, dtype=torch.float64), 1.0)
        return value.item(), gradient(value, student)[0, 0].item()

    (before, slope), (after, tangent) = term(turn - 1e-6), term(turn + 5)
    assert slope == pytest.approx(-math.exp(30) / 2, rel=1e-5)
    assert tangent == pytest.approx(slope, rel=1e-5)
    assert after == pytest.approx(before + 5 * math.exp(30) / 2, rel=1e-5)
    value, slope = term(5000.0)
    assert math.isfinite(value) and slope == pytest.approx(tangent, rel=1e-5)


@pytest.mark.parametrize(("skewed", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)])
def test_a_skew_of_zero_is_the_kl(skewed: Callable[..., Tensor], plain: Divergence) -> None:
    student, teacher = sides()
    assert torch.equal(skewed(student, teacher, 0.0), plain(student, teacher))
    torch.testing.assert_close(skewed(student, teacher, 1e-9), plain(student, teacher), rtol=1e-5, atol=1e-6)
    slope = gradient(plain(student, teacher), student)
    torch.testing.assert_close(gradient(skewed(student, teacher, 1e-9), student), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.9])
def test_gradients_of_the_skewed_kls_against_closed_forms(weight: float) -> None:
    student, teacher = sides()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    mixed = weight * p + (1 - weight) * q
    want = through_softmax(student, -p * (1 - weight) * q / mixed)
    torch.testing.assert_close(
        gradient(skew_forward_kl(student, teacher, weight), student), want, rtol=1e-9, atol=1e-12
    )
    mixed = weight * q + (1 - weight) * p
    want = through_softmax(student, q * ((q / mixed).log() + 1 - weight * q / mixed))
    torch.testing.assert_close(
        gradient(skew_reverse_kl(student, teacher, weight), student), want, rtol=1e-9, atol=1e-12
    )


def test_skewed_kls_add_up_to_the_jensen_shannon_divergence() -> None:
    student, teacher = (side.detach() for side in sides())
    half = skew_forward_kl(student, teacher, 0.5) / 2 + skew_reverse_kl(student, teacher, 0.5) / 2
    torch.testing.assert_close(half, jsd(student, teacher), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_skewed_kls_are_bounded_where_the_other_side_gives_no_mass(weight: float) -> None:
    one, other = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    for function in (skew_forward_kl, skew_reverse_kl):
        assert function(one, other, weight).item() == pytest.approx(-math.log(weight), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "function"), [("skew_forward_kl", skew_forward_kl), ("skew_reverse_kl", skew_reverse_kl)]
)
@pytest.mark.parametrize("weight", [1.0, -0.1, 1.5, math.nan])
def test_skews_outside_their_range_are_refused(name: str, function: Callable[..., Tensor], weight: float) -> None:
    with pytest.raises(ConfigError) as error:
        function(torch.zeros(2), torch.zeros(2), weight)
    assert str(error.value) == (
        f"{name}.weight\n    got:      {weight}\n    expected: 0 <= weight < 1 (at 1 the divergence is 0)\n"
        "    try:      0.1"
    )


@pytest.mark.parametrize("exponent", [math.inf, -math.inf, math.nan])
def test_exponents_that_are_not_finite_are_refused(exponent: float) -> None:
    with pytest.raises(ConfigError) as error:
        power(torch.zeros(2), torch.zeros(2), exponent)
    assert str(error.value) == f"power.exponent\n    got:      {exponent}\n    expected: a finite number"


EXTREMES = {
    "opposed": ([1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 0.0, 3.0]),
    "saturated student": ([1e4, -1e4, 0.0, 3.0], [0.1, 0.2, 0.3, 0.4]),
    "saturated teacher": ([0.1, 0.2, 0.3, 0.4], [1e4, -1e4, 0.0, 3.0]),
    "equal": ([1e4, -1e4, 0.0, 3.0], [1e4, -1e4, 0.0, 3.0]),
    "temperature 0.01": ([200.0, -70.0, 90.0, 199.0], [-30.0, 80.0, 81.0, 5.0]),
    "impossible on both sides": ([0.3, -torch.inf, 1.0, 0.2], [0.1, -torch.inf, 0.0, 2.0]),
    "impossible for the teacher": ([0.3, 0.1, 1.0, 0.2], [0.1, -torch.inf, 0.0, 2.0]),
    "impossible for the student": ([0.3, -torch.inf, 1.0, 0.2], [0.1, 0.4, 0.0, 2.0]),
}

INFINITE = {
    # What is truly infinite there, by the formula.
    "impossible for the teacher": {"todi", "power -2.5", "power -1.0"},
    "impossible for the student": {"todi", "power 0.0", f"power {2 / 3}", "power 1.0", "power 2.0"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits(name: str, case: str, dtype: torch.dtype) -> None:
    ours, theirs = (torch.tensor([side], dtype=dtype) for side in EXTREMES[case])
    student = ours.requires_grad_()
    value = PARTS[name](student, theirs)
    assert value.dtype == torch.float32
    if name in INFINITE.get(case, ()):
        assert value.item() == torch.inf
        return
    value.sum().backward()
    assert value.isfinite().all() and value.item() > -1e-6
    assert student.grad is not None and student.grad.isfinite().all()
    if case == "equal":
        assert value.item() == pytest.approx(0, abs=1e-6)
    if case == "impossible on both sides":
        rest = [0, 2, 3]
        assert value.item() == pytest.approx(PARTS[name](ours.detach()[:, rest], theirs[:, rest]).item(), rel=1e-5)
        assert student.grad[0, 1] == 0


@pytest.mark.parametrize("name", PARTS)
def test_float32_matches_float64_at_low_temperature(name: str) -> None:
    ours, theirs = logits(40, 11, seed=0) / 0.2, logits(40, 11, seed=1) / 0.2
    wide, narrow = ours.clone().requires_grad_(), ours.float().requires_grad_()
    exact, value = PARTS[name](wide, theirs), PARTS[name](narrow, theirs.float())
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-4)
    exact.sum().backward()
    value.sum().backward()
    assert wide.grad is not None and narrow.grad is not None
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=2e-3, atol=1e-3 * float(wide.grad.abs().max()))
