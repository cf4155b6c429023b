"""Divergences against closed forms, limits and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.functional.divergences import (
    bounded_k2,
    forward_kl,
    jsd,
    k1,
    k2,
    k3,
    reverse_kl,
    topk_forward_kl,
    topk_reverse_kl,
)

FULL = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
TOPK = {"reverse": topk_reverse_kl, "forward": topk_forward_kl}


def logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_kl(p: Tensor, q: Tensor) -> float:
    """Σ p log(p/q) over python floats: the formula, read aloud."""
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def pair(k: int, vocabulary: int = 7, rows: int = 50) -> tuple[Tensor, Tensor]:
    """Both sides' log-probs at the teacher's k most likely tokens."""
    student = logits(rows, vocabulary, seed=0).log_softmax(-1)
    teacher = logits(rows, vocabulary, seed=1).log_softmax(-1)
    ids = teacher.topk(k, dim=-1).indices
    return student.gather(-1, ids), teacher.gather(-1, ids)


def test_sampled_estimators_by_hand() -> None:
    student, teacher = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-3.0, -1.0, -2.0])
    assert k1(student, teacher).tolist() == [2.0, -2.0, 0.0]
    assert k2(student, teacher).tolist() == [2.0, 2.0, 0.0]
    expected = [math.exp(-2) + 2 - 1, math.exp(2) - 2 - 1, 0.0]
    assert k3(student, teacher).tolist() == pytest.approx(expected, rel=1e-6)


def test_k3_keeps_its_precision_near_zero() -> None:
    gap = torch.tensor([1e-4], dtype=torch.float32)
    assert k3(torch.zeros(1), gap).item() == pytest.approx(0.5e-8, rel=1e-2)  # e^d - d - 1 alone would give 0


def test_bounded_k2_bounds_the_gradient_and_not_the_value() -> None:
    student = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    teacher = torch.tensor([-16.0, -4.0, -1.5, 8.0])
    value = bounded_k2(student, teacher, bound=5.0)
    assert value.tolist() == [5 * (15 - 2.5), 4.5, 0.125, 5 * (9 - 2.5)]
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.tolist() == [5.0, 3.0, 0.5, -5.0]  # clamp(d, ±5): the near-impossible token keeps its pull


@pytest.mark.parametrize("name", FULL)
def test_full_divergences_against_the_formula(name: str) -> None:
    student, teacher = logits(4, 3, 5, seed=0), logits(4, 3, 5, seed=1)
    got = FULL[name](student, teacher)
    assert got.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            p, q = student[i, j].softmax(-1), teacher[i, j].softmax(-1)
            mixture = (p + q) / 2
            want = {
                "forward_kl": plain_kl(q, p),
                "reverse_kl": plain_kl(p, q),
                "jsd": (plain_kl(q, mixture) + plain_kl(p, mixture)) / 2,
            }[name]
            assert float(got[i, j]) == pytest.approx(want, rel=1e-12)


def test_jsd_with_another_weight_against_the_formula() -> None:
    student, teacher = logits(6, seed=0), logits(6, seed=1)
    p, q = student.softmax(-1), teacher.softmax(-1)
    mixture = 0.3 * q + 0.7 * p
    want = 0.3 * plain_kl(q, mixture) + 0.7 * plain_kl(p, mixture)
    assert float(jsd(student, teacher, teacher_weight=0.3)) == pytest.approx(want, rel=1e-12)


def test_full_gradients_against_closed_forms() -> None:
    student, teacher = logits(20, 6, seed=0).requires_grad_(), logits(20, 6, seed=1)
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    (forward,) = torch.autograd.grad(forward_kl(student, teacher).sum(), student)
    torch.testing.assert_close(forward, p - q, rtol=1e-12, atol=1e-14)
    (reverse,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), student)
    gap = p.log() - q.log()
    torch.testing.assert_close(reverse, p * (gap - (p * gap).sum(-1, keepdim=True)), rtol=1e-10, atol=1e-13)
    # Half the Jensen-Shannon gradient: ∂/∂z ½KL(p‖m), the other half has no direct term: ½ p (log(p/m) − Σ p log(p/m)).
    (halves,) = torch.autograd.grad(jsd(student, teacher).sum(), student)
    gap = p.log() - ((p + q) / 2).log()
    torch.testing.assert_close(halves, p / 2 * (gap - (p * gap).sum(-1, keepdim=True)), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", FULL)
def test_full_gradcheck(name: str) -> None:
    student, teacher = logits(3, 5, seed=0).requires_grad_(), logits(3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: FULL[name](x, teacher), (student,))


@pytest.mark.parametrize("direction", TOPK)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_topk_gradcheck(direction: str, tail: bool, k: int) -> None:
    student, teacher = logits(3, 7, seed=0).requires_grad_(), logits(3, 7, seed=1).log_softmax(-1)
    ids = teacher.topk(k, dim=-1).indices

    def value(x: Tensor) -> Tensor:
        return TOPK[direction](x.log_softmax(-1).gather(-1, ids), teacher.gather(-1, ids), tail)

    assert torch.autograd.gradcheck(value, (student,))


def test_jsd_limits_are_the_two_kls() -> None:
    student, teacher = logits(20, 6, seed=0), logits(20, 6, seed=1)
    w = 1e-6
    torch.testing.assert_close(jsd(student, teacher, w) / w, forward_kl(student, teacher), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(jsd(student, teacher, 1 - w) / w, reverse_kl(student, teacher), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("weight", "instead"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (-0.5, "forward_kl")])
def test_jsd_ends_are_refused(weight: float, instead: str) -> None:
    with pytest.raises(ConfigError) as error:
        jsd(torch.zeros(2), torch.zeros(2), teacher_weight=weight)
    assert str(error.value) == (
        f"jsd.teacher_weight\n    got:      {weight}\n    expected: 0 < teacher_weight < 1\n    try:      {instead}"
    )


@pytest.mark.parametrize("name", FULL)
def test_full_divergences_are_zero_only_when_equal(name: str) -> None:
    student, teacher = logits(30, 6, seed=0), logits(30, 6, seed=1)
    assert FULL[name](student, student + 3.0).abs().max() < 1e-14  # a constant shift of the logits is the same policy
    assert FULL[name](student, teacher).min() > 1e-3


@pytest.mark.parametrize("direction", TOPK)
def test_topk_with_a_tail_is_a_lower_bound_that_grows_to_the_full_kl(direction: str) -> None:
    full = (reverse_kl if direction == "reverse" else forward_kl)(logits(50, 7, seed=0), logits(50, 7, seed=1))
    before = torch.zeros(50, dtype=torch.float64)
    for k in range(1, 8):
        value = TOPK[direction](*pair(k))
        assert (value >= before - 1e-12).all(), f"falls at k={k}"
        assert (value <= full + 1e-12).all()
        before = value
        if k >= 6:  # V - 1: the bucket is one token; V: it is empty
            torch.testing.assert_close(value, full, rtol=1e-9, atol=1e-12)
    assert (TOPK[direction](*pair(2)) < full - 1e-3).any()


def test_topk_by_hand() -> None:
    student, teacher = torch.tensor([0.5, 0.2]), torch.tensor([0.6, 0.3])
    kept = 0.5 * math.log(0.5 / 0.6) + 0.2 * math.log(0.2 / 0.3)
    assert topk_reverse_kl(student.log(), teacher.log(), tail=False).item() == pytest.approx(kept, rel=1e-5)
    want = kept + 0.3 * math.log(0.3 / 0.1)
    assert topk_reverse_kl(student.log(), teacher.log()).item() == pytest.approx(want, rel=1e-5)
    kept = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.2)
    assert topk_forward_kl(student.log(), teacher.log(), tail=False).item() == pytest.approx(kept, rel=1e-5)
    want = kept + 0.1 * math.log(0.1 / 0.3)
    assert topk_forward_kl(student.log(), teacher.log()).item() == pytest.approx(want, rel=1e-5)


def test_a_truncated_reverse_kl_is_lowered_by_leaving_the_topk() -> None:
    teacher = torch.tensor([0.6, 0.3]).log()
    inside, outside = torch.tensor([0.55, 0.25]).log(), torch.tensor([0.25, 0.1]).log()
    assert topk_reverse_kl(outside, teacher, tail=False) < topk_reverse_kl(inside, teacher, tail=False) < 0
    assert 0 < topk_reverse_kl(inside, teacher) < topk_reverse_kl(outside, teacher)  # the bucket turns the order round


EXTREMES = {
    "opposed": ([1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 0.0, 3.0]),
    "saturated student": ([1e4, -1e4, 0.0, 3.0], [0.1, 0.2, 0.3, 0.4]),
    "saturated teacher": ([0.1, 0.2, 0.3, 0.4], [1e4, -1e4, 0.0, 3.0]),
    "equal": ([1e4, -1e4, 0.0, 3.0], [1e4, -1e4, 0.0, 3.0]),
    "temperature 0.01": ([200.0, -70.0, 90.0, 199.0], [-30.0, 80.0, 81.0, 5.0]),
    "impossible on both sides": ([0.3, -torch.inf, 1.0, 0.2], [0.1, -torch.inf, 0.0, 2.0]),
    "impossible for the teacher, forward": ([0.3, 0.1, 1.0, 0.2], [0.1, -torch.inf, 0.0, 2.0]),
}


EXTREME_CASES = [
    (name, case)
    for name in [*FULL, *(f"topk {d} {k} {t}" for d in TOPK for k in (1, 2, 4) for t in (True, False))]
    for case in EXTREMES
    # KL(student‖teacher) *is* infinite where the teacher's probability is 0 and the student's is not.
    if not ("forward" in case and "reverse" in name)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "case"), EXTREME_CASES)
def test_extreme_logits_give_finite_values_and_gradients(name: str, case: str, dtype: torch.dtype) -> None:
    ours, theirs = (torch.tensor([side], dtype=dtype) for side in EXTREMES[case])
    student = ours.requires_grad_()
    if name in FULL:
        value = FULL[name](student, theirs)
    else:
        _, direction, k, tail = name.split()
        theirs = theirs.float().log_softmax(-1)
        ids = theirs.topk(int(k), dim=-1).indices
        sides = (student.float().log_softmax(-1).gather(-1, ids), theirs.gather(-1, ids))
        value = TOPK[direction](*(side.to(dtype) for side in sides), tail == "True")
    value.sum().backward()
    assert value.dtype == torch.float32 and value.isfinite().all()
    assert student.grad is not None and student.grad.isfinite().all()
    if name in FULL or name.endswith("True"):
        assert value.item() > -1e-6
    if case == "equal":
        assert value.item() == pytest.approx(0, abs=1e-6)
    if case == "impossible on both sides" and name in FULL:
        rest = [0, 2, 3]
        alone = FULL[name](ours.detach()[:, rest], theirs[:, rest])
        assert value.item() == pytest.approx(alone.item(), rel=1e-5)


def test_low_temperature_matches_float64() -> None:
    """A finite loss with a NaN gradient is how reverse KL and JSD fail at low temperature."""
    ours, theirs = logits(40, 11, seed=0, scale=3.0) / 0.05, logits(40, 11, seed=1, scale=3.0) / 0.05
    for function in FULL.values():
        wide, narrow = ours.clone().requires_grad_(), ours.float().requires_grad_()
        exact, value = function(wide, theirs), function(narrow, theirs.float())
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
        exact.sum().backward()
        value.sum().backward()
        assert wide.grad is not None and narrow.grad is not None
        # Gradients are sums of terms near 100 nats; float32 holds those to about 1e-5.
        torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_written_gradient_of_a_kl_is_that_of_finite_differences_and_of_autograd(name: str) -> None:
    ours, theirs = (logits(3, 7, seed=seed, scale=2.0).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(FULL[name], (ours, theirs))
    ours, theirs = (side.detach() for side in (ours, theirs))
    ours[:, 2] = theirs[:, 2] = -torch.inf  # impossible on both sides: 0 · log 0
    first, second = (ours, theirs) if name == "reverse_kl" else (theirs, ours)
    first[:, 4] = -torch.inf  # impossible where it weighs
    kept = [0, 1, 3, 4, 5, 6]
    found, expected = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    value = FULL[name](found, theirs)
    logp, logq = ((expected if side is ours else side)[:, kept].log_softmax(-1) for side in (first, second))
    terms = torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp.clamp(min=-1e30) - logq))
    torch.testing.assert_close(value, terms.sum(-1), rtol=0, atol=1e-12)
    column = torch.rand(3, dtype=torch.float64)
    (value @ column).backward()
    (terms.sum(-1) @ column).backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12)
