"""GSPO against the sequence objective written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.functional.aggregation import denominator, token_coefficients
from distillkit.functional.objectives import sequence_log_ratio
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.gspo import GSPO
from distillkit.types import StudentScores


def case(spread: float = 1e-3) -> tuple[StudentScores, Tensor, Tensor]:
    """Student, old log-probs and one advantage per rollout; rollouts of 1 to 9 tokens, with holes (tool output)."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(9)[None] < torch.arange(1, 10)[:, None]
    mask[4, 2] = mask[7, 0] = mask[8, 5] = False
    old = (-3 * torch.rand(9, 9, dtype=torch.float64, generator=generator)).masked_fill(~mask, 0.0)
    moved = spread * torch.randn(9, 9, dtype=torch.float64, generator=generator)
    logprobs = (old + moved).masked_fill(~mask, 0.0).requires_grad_()
    advantages = torch.randn(9, 1, dtype=torch.float64, generator=generator) * mask
    return StudentScores(loss_mask=mask, logprobs=logprobs, distil_logprobs=logprobs), old, advantages


def sequence_objective(student: StudentScores, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """−mean over rollouts of min(s·Â, clip(s)·Â), s = (Π π_θ/π_old)^{1/|y|} with its whole gradient."""
    terms = []
    for i, mask in enumerate(student.loss_mask):
        s = ((student.logprobs[i] - old[i])[mask].sum() / mask.sum()).exp()
        a = advantages[i][mask][0]
        terms.append(-torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a))
    return torch.stack(terms).mean()


def aggregated(part: GRPO, student: StudentScores, old: Tensor, advantages: Tensor) -> Tensor:
    mask = student.loss_mask
    total = denominator(mask, part.aggregation)
    factors = token_coefficients(mask, torch.ones(mask.shape), part.aggregation, total)
    return (part.loss(student, old, None, advantages) * factors.double()).sum()


@pytest.mark.parametrize(
    ("low", "high", "spread"), [(3e-4, 4e-4, 1e-3), (1.0, 9.0, 1e-3), (0.2, 0.28, 1.0), (1e-9, 1e-9, 1e-3)]
)
def test_value_and_gradient_are_those_of_the_sequence_objective(low: float, high: float, spread: float) -> None:
    student, old, advantages = case(spread)
    part = GSPO(clip_low=low, clip_high=high)
    ours, theirs = aggregated(part, student, old, advantages), sequence_objective(student, old, advantages, low, high)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    got, want = (torch.autograd.grad(x, student.logprobs, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    clipped = (want == 0).all(1)
    assert 0 < clipped.sum() < 9 or low == 1.0  # whole rollouts lose their gradient, or none does


def test_the_ratio_is_a_geometric_mean_over_loss_mask_tokens_by_hand() -> None:
    mask = torch.tensor([[False, True, True, False, True]])  # prompt, sampled, sampled, tool output, sampled
    old = torch.tensor([[0.0, -1.0, -2.0, 0.0, -3.0]])
    logprobs = torch.tensor([[0.0, -0.7, -2.3, 5.0, -2.4]], requires_grad=True)
    student = StudentScores(loss_mask=mask, logprobs=logprobs, distil_logprobs=logprobs)
    part = GSPO(clip_low=1.0, clip_high=9.0)
    ratio = math.exp(0.2)  # (0.3 − 0.3 + 0.6) / 3
    advantages = torch.full((1, 5), 2.0) * mask
    found = part.diagnostics(student, old, None, advantages)
    assert found["ratio"][mask].tolist() == pytest.approx([ratio] * 3)
    loss = part.loss(student, old, None, advantages)
    assert loss.tolist()[0] == pytest.approx([0.0, -2 * ratio, -2 * ratio, 0.0, -2 * ratio])
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist()[0] == pytest.approx([0.0, -2 * ratio, -2 * ratio, 0.0, -2 * ratio])


def test_tokens_may_have_advantages_of_their_own() -> None:
    """GSPO-token: the rollout's ratio and clip, the token's advantage and gradient."""
    student, old, _ = case(spread=0.1)
    generator = torch.Generator().manual_seed(5)
    advantages = torch.randn(9, 9, dtype=torch.float64, generator=generator) * student.loss_mask
    part = GSPO(clip_low=0.02, clip_high=0.03)
    loss = part.loss(student, old, None, advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), student.logprobs)
    for i, mask in enumerate(student.loss_mask):
        s = ((student.logprobs[i] - old[i])[mask].sum() / mask.sum()).exp().item()
        for t in mask.nonzero().flatten().tolist():
            a = advantages[i, t].item()
            binds = (a > 0 and s > 1.03) or (a < 0 and s < 0.98)
            assert gradient[i, t].item() == pytest.approx(0.0 if binds else -s * a, rel=1e-9)


def test_on_policy_it_is_grpo_with_a_mean_per_rollout() -> None:
    student, _, advantages = case()
    old = student.logprobs.detach()
    ours = torch.autograd.grad(aggregated(GSPO(), student, old, advantages), student.logprobs)[0]
    theirs = torch.autograd.grad(aggregated(GRPO(aggregation="sequence"), student, old, advantages), student.logprobs)[
        0
    ]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("length", [1, 1000, 32_768])
def test_a_long_rollouts_mean_is_exact_to_far_below_the_clip(length: int) -> None:
    """float32 log-probs that move by ±4 nats and on average by 2⁻¹²: 2.4e-4, inside a clip of 3e-4."""
    exact = 2.0**-12
    old = -8 * torch.rand(2, length + 3, generator=torch.Generator().manual_seed(0)).mul(64).round() / 64
    swing = torch.where(torch.arange(length + 3) % 2 == 0, 4.0, -4.0)
    if length % 2:
        swing[length - 1] = 0.0
    mask = torch.arange(length + 3).expand(2, -1) < length
    logprobs = ((old + swing + exact).double().float()).masked_fill(~mask, 123.0)
    found = sequence_log_ratio(logprobs, old, mask)
    assert found.dtype == torch.float32
    assert (found[mask] - exact).abs().max() < 2e-7  # rounding of the log-probs themselves
    assert (found[~mask] == 0).all()


def test_no_tokens_are_no_nan() -> None:
    student = torch.zeros(1, 4, requires_grad=True)
    found = sequence_log_ratio(student, torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool))
    assert found.tolist() == [[0.0] * 4]
    assert torch.autograd.grad(found.sum(), student)[0].tolist() == [[0.0] * 4]


def test_clip_shares_count_whole_rollouts() -> None:
    student, old, advantages = case()
    part = GSPO()
    found, mask = part.diagnostics(student, old, None, advantages), student.loss_mask
    for i in range(9):
        s = ((student.logprobs[i] - old[i])[mask[i]].sum() / mask[i].sum()).exp().item()
        a = advantages[i][mask[i]][0].item()
        assert found["clipped_high"][i][mask[i]].tolist() == [float(a > 0 and s > 1 + 4e-4)] * int(mask[i].sum())
        assert found["clipped_low"][i][mask[i]].tolist() == [float(a < 0 and s < 1 - 3e-4)] * int(mask[i].sum())
    assert found["clipped_high"].sum() > 0 and found["clipped_low"].sum() > 0


def test_published_defaults() -> None:
    part = GSPO()
    assert (part.clip_low, part.clip_high, part.aggregation, part.std) == (3e-4, 4e-4, "sequence", True)
    assert part.dual_clip is None and not part.needs


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"clip_low": -1e-4}, "clip_low", "between 0 and 1"),
        ({"clip_high": math.nan}, "clip_high", "at least 0"),
        ({"constant_length": 10}, "constant_length", "null unless aggregation is constant"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        GSPO(**arguments)
    assert str(error.value) == f"model.objective.{name}\n    got:      {arguments[name]}\n    expected: {expected}"
