"""RLSD: the teacher's factor by hand, and where it has no say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError, ContractError
from distillkit.functional.objectives import teacher_evidence
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.rlsd import RLSD
from distillkit.types import ScoreRequest, StudentScores, TeacherScores


def case(rows: int = 8, columns: int = 40) -> tuple[StudentScores, Tensor, Tensor, Tensor]:
    """Off-policy student, old, teacher log-probs and advantages [n, L]; the last columns are padding."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4, rows, columns, generator=generator)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[:, -5:] = False
    old = (-4 * draws[0]).masked_fill(~mask, 0.0)
    logprobs = (old + 2 * draws[1] - 1).masked_fill(~mask, 0.0).requires_grad_()
    teacher = (-6 * draws[2]).masked_fill(~mask, 0.0)
    advantages = (4 * draws[3] - 2).masked_fill(~mask, 0.0)
    return StudentScores(loss_mask=mask, logprobs=logprobs, distil_logprobs=logprobs), old, teacher, advantages


def test_against_the_formula_token_by_token() -> None:
    student, old, teacher, advantages = case()
    part = RLSD(mix=0.3, bound=0.6, clip_high=0.28)
    scores = TeacherScores(valid=student.loss_mask, sampled=teacher)
    loss = part.loss(student, old, scores, advantages)
    found = part.diagnostics(student, old, scores, advantages)
    for i, t in ((0, 0), (1, 3), (2, 7), (5, 30), (7, 34), (3, 11)):
        a, d = advantages[i, t].item(), (teacher - old)[i, t].item()
        evidence = math.exp(math.copysign(1, a) * d)
        factor = 0.7 + 0.3 * min(max(evidence, 0.4), 1.6)
        r = math.exp((student.logprobs - old)[i, t].item())
        want = -min(r * a * factor, min(max(r, 0.8), 1.28) * a * factor)
        assert loss[i, t].item() == pytest.approx(want, rel=1e-4)
        assert found["teacher_factor"][i, t].item() == pytest.approx(factor, rel=1e-5)
        assert found["teacher_clamped"][i, t].item() == float(abs(evidence - 1) > 0.6)
    shares = {name: found[name][student.loss_mask].mean().item() for name in ("teacher_clamped", "clipped_high")}
    assert all(0 < share < 1 for share in shares.values())


@pytest.mark.parametrize(
    ("advantage", "d", "want"),
    [
        (1.0, 0.1, math.exp(0.1)),  # good, and the teacher likes the token: more of it
        (1.0, -0.1, math.exp(-0.1)),
        (-1.0, 0.1, math.exp(-0.1)),  # bad, but the teacher likes the token: less of the blame
        (-1.0, -0.1, math.exp(0.1)),
        (0.0, 5.0, 1.0),
        (0.0, -math.inf, 1.0),
        (1.0, -math.inf, 0.0),
        (-1.0, -math.inf, math.inf),
    ],
)
def test_evidence_by_hand(advantage: float, d: float, want: float) -> None:
    old = torch.tensor([-2.0], dtype=torch.float64)
    assert teacher_evidence(old + d, old, torch.tensor([advantage])).item() == pytest.approx(want)


def test_the_teacher_never_turns_a_sign_nor_takes_a_gradient_away() -> None:
    student, old, teacher, advantages = case()
    on_policy = StudentScores(
        loss_mask=student.loss_mask, logprobs=(leaf := old.clone().requires_grad_()), distil_logprobs=leaf
    )
    scores = TeacherScores(valid=student.loss_mask, sampled=(20 * teacher).requires_grad_())
    loss = RLSD(mix=1.0, bound=0.99).loss(on_policy, old, scores, advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    assert torch.equal(gradient.sign(), -advantages.sign())
    assert scores.sampled is not None
    assert torch.autograd.grad(loss.sum(), scores.sampled, allow_unused=True)[0] is None


@pytest.mark.parametrize("switches", [{}, {"dual_clip": 3.0}, {"clip_low": 0.05, "clip_high": 0.5}], ids=str)
def test_mix_zero_and_a_teacher_that_agrees_are_grpo_bit_for_bit(switches: dict[str, Any]) -> None:
    student, old, teacher, advantages = case()
    plain = GRPO(**switches).loss(student, old, None, advantages)
    for part, sampled in ((RLSD(mix=0.0, **switches), teacher), (RLSD(**switches), old)):
        loss = part.loss(student, old, TeacherScores(valid=student.loss_mask, sampled=sampled), advantages)
        assert torch.equal(loss, plain)


@pytest.mark.parametrize("junk", [float("nan"), float("-inf"), -1e30])
def test_where_the_teacher_is_not_valid_the_factor_is_one(junk: float) -> None:
    student, old, teacher, advantages = case()
    valid = student.loss_mask & (torch.arange(40) % 3 != 0)
    scores = TeacherScores(valid=valid, sampled=torch.where(valid, teacher, junk))
    part = RLSD()
    loss, plain = part.loss(student, old, scores, advantages), GRPO().loss(student, old, None, advantages)
    assert torch.equal(loss[~valid], plain[~valid]) and not torch.allclose(loss[valid], plain[valid])
    found = part.diagnostics(student, old, scores, advantages)
    assert (found["teacher_factor"][~valid] == 1).all() and (found["teacher_clamped"][~valid] == 0).all()


def test_defaults() -> None:
    part = RLSD()
    assert (part.mix, part.bound, part.aggregation, part.clip_low, part.clip_high) == (0.5, 0.2, "token", 0.2, 0.2)
    assert part.needs == ScoreRequest(sampled=True)


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"mix": 1.5}, "mix", "between 0 (GRPO) and 1 (the teacher's factor alone)"),
        ({"mix": -0.1}, "mix", "between 0 (GRPO) and 1 (the teacher's factor alone)"),
        ({"bound": 0.0}, "bound", "above 0 and below 1: at 1 the factor could take a token's gradient away"),
        ({"bound": 1.0}, "bound", "above 0 and below 1: at 1 the factor could take a token's gradient away"),
        ({"dual_clip": 0.5}, "dual_clip", "above 1, or null for none"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        RLSD(**arguments)
    assert str(error.value) == f"model.objective.{name}\n    got:      {arguments[name]}\n    expected: {expected}"


@pytest.mark.parametrize(
    "scores", [None, TeacherScores(valid=torch.ones(8, 40, dtype=torch.bool))], ids=["no", "empty"]
)
def test_missing_teacher_is_named(scores: TeacherScores | None) -> None:
    student, old, _, advantages = case()
    with pytest.raises(ContractError) as error:
        RLSD().loss(student, old, scores, advantages)
    assert str(error.value) == (
        "RLSD: the teacher's log-probs of the sampled tokens\n    expected: TeacherScores.sampled [n, L]"
    )
