"""TRRD against GRPO and the facts of its ratio."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.errors import ConfigError, ContractError
from distillkit.functional.objectives import ClampGradient
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.trrd import TRRD
from distillkit.testing import reward_output, rollout_batch
from distillkit.types import ScoreRequest, StudentScores, TeacherScores

MODES: tuple[ClampGradient, ...] = ("differentiable", "through", "detached")
SWITCHES: list[dict[str, Any]] = [
    {},
    {"dual_clip": 3.0},
    {"clip_low": 0.05, "clip_high": 0.5},
    {"std": False, "correction": 1, "eps": 1e-6},
]


def case(spread: float = 1.0, rows: int = 8, columns: int = 40) -> tuple[StudentScores, Tensor, Tensor, Tensor]:
    """Off-policy student, old, teacher log-probs and advantages [n, L], float32; the last columns are padding."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4, rows, columns, generator=generator)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[:, -5:] = False
    old = (-4 * draws[0]).masked_fill(~mask, 0.0)
    logprobs = (old + spread * (2 * draws[1] - 1)).masked_fill(~mask, 0.0).requires_grad_()
    teacher = (-9 * draws[2]).masked_fill(~mask, 0.0)
    advantages = (4 * draws[3] - 2).masked_fill(~mask, 0.0)
    student = StudentScores(loss_mask=mask, logprobs=logprobs, distil_logprobs=logprobs)
    return student, old, teacher, advantages


def gradient(loss: Tensor, student: StudentScores) -> Tensor:
    return torch.autograd.grad(loss.sum(), student.logprobs, retain_graph=True)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_alpha_one_is_grpo_bit_for_bit_off_policy(mode: ClampGradient, switches: dict[str, Any]) -> None:
    student, old, teacher, advantages = case()
    trrd = TRRD(alpha=1.0, clamp_grad=mode, **switches)
    equal = {name: getattr(trrd, name) for name in ("std", "correction", "eps", "aggregation", "clip_low", "clip_high")}
    grpo = GRPO(dual_clip=trrd.dual_clip, **equal)
    scores = TeacherScores(valid=student.loss_mask, sampled=teacher)
    ours, theirs = trrd.loss(student, old, scores, advantages), grpo.loss(student, old, None, advantages)
    assert torch.equal(ours, theirs)
    assert torch.equal(gradient(ours, student), gradient(theirs, student))
    assert (ours != 0).any() and ((student.logprobs - old).abs() > 0.3).any()
    logged, plain = trrd.diagnostics(student, old, scores, advantages), grpo.diagnostics(student, old, None, advantages)
    assert all(torch.equal(logged[name], value) for name, value in plain.items())
    rollouts, rewards = rollout_batch(), reward_output(12)
    assert torch.equal(trrd.advantages(rollouts, rewards, None), grpo.advantages(rollouts, rewards, None))


@pytest.mark.parametrize("mode", ["differentiable", "through"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_teacher_equal_to_old_is_grpo_for_every_alpha(mode: ClampGradient, alpha: float) -> None:
    student, old, _, advantages = case(spread=0.9)  # the clamp at 1 does not bind
    scores = TeacherScores(valid=student.loss_mask, sampled=old)
    ours = TRRD(alpha=alpha, clamp_grad=mode).loss(student, old, scores, advantages)
    theirs = GRPO(clip_high=0.28).loss(student, old, None, advantages)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient(ours, student), gradient(theirs, student), rtol=0, atol=2e-6)


def test_the_teacher_counts_for_alpha_below_one() -> None:
    student, old, teacher, advantages = case()
    scores = TeacherScores(valid=student.loss_mask, sampled=teacher)
    loss = [TRRD(alpha=a).loss(student, old, scores, advantages) for a in (0.0, 0.5, 1.0)]
    assert not torch.allclose(loss[0], loss[1]) and not torch.allclose(loss[1], loss[2])
    other = TRRD().loss(student, old, TeacherScores(valid=student.loss_mask, sampled=teacher - 0.3), advantages)
    assert not torch.allclose(gradient(other, student), gradient(loss[1], student))


def test_ratio_by_hand() -> None:
    """α = ¼: log r = ¼·0.4 + ¾·(−0.2), no clip: r = e^−0.05; and clamped, log r = ¼·0.4 + ¾·1."""
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    student = StudentScores(loss_mask=torch.ones(1, 2, dtype=torch.bool), logprobs=logprobs, distil_logprobs=logprobs)
    old, teacher = torch.tensor([[-1.4, -1.4]]), torch.tensor([[-0.8, -9.0]])
    scores = TeacherScores(valid=student.loss_mask, sampled=teacher)
    part = TRRD(alpha=0.25, clip_high=9.0)
    found = part.diagnostics(student, old, scores, torch.ones(1, 2))
    assert found["ratio"][0].tolist() == pytest.approx([math.exp(-0.05), math.exp(0.85)])
    assert found["teacher_clamped"].tolist() == [[0.0, 1.0]]
    loss = part.loss(student, old, scores, torch.ones(1, 2))
    assert loss[0].tolist() == pytest.approx([-math.exp(-0.05), -math.exp(0.85)])
    # ∇r = r·∇log π_θ inside the clamp; where it binds only the old policy's part is left: α·r.
    assert gradient(loss, student)[0].tolist() == pytest.approx([-math.exp(-0.05), -0.25 * math.exp(0.85)])
    through = TRRD(alpha=0.25, clip_high=9.0, clamp_grad="through").loss(student, old, scores, torch.ones(1, 2))
    assert gradient(through, student)[0].tolist() == pytest.approx([-math.exp(-0.05), -math.exp(0.85)])
    detached = TRRD(alpha=0.25, clip_high=9.0, clamp_grad="detached").loss(student, old, scores, torch.ones(1, 2))
    assert gradient(detached, student)[0].tolist() == pytest.approx([-0.25 * math.exp(-0.05), -0.25 * math.exp(0.85)])


@pytest.mark.parametrize(
    ("advantage", "gap", "learns"),
    [(1.0, 0.49, True), (1.0, 0.50, False), (-1.0, -0.44, True), (-1.0, -0.45, False)],
)
def test_first_step_thresholds(advantage: float, gap: float, learns: bool) -> None:
    """On-policy, α = ½, clip [0.8, 1.28]: log gaps of 0.494 (ratio 1.638) and −0.446 (ratio 1/1.5625)."""
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    student = StudentScores(loss_mask=torch.ones(1, 1, dtype=torch.bool), logprobs=logprobs, distil_logprobs=logprobs)
    scores = TeacherScores(valid=student.loss_mask, sampled=logprobs.detach() - gap)
    loss = TRRD().loss(student, logprobs.detach(), scores, torch.full((1, 1), advantage, dtype=torch.float64))
    assert (gradient(loss, student).item() != 0) == learns


@pytest.mark.parametrize("junk", [float("nan"), float("-inf"), 0.0, -1e30])
def test_where_the_teacher_is_not_valid_the_ratio_is_grpos(junk: float) -> None:
    student, old, teacher, advantages = case()
    valid = student.loss_mask & (torch.arange(40) % 3 != 0)
    part, plain = TRRD(), GRPO(clip_high=0.28)
    scores = TeacherScores(valid=valid, sampled=torch.where(valid, teacher, junk))
    loss, grpo = part.loss(student, old, scores, advantages), plain.loss(student, old, None, advantages)
    assert torch.equal(loss[~valid], grpo[~valid])
    assert torch.equal(gradient(loss, student)[~valid], gradient(grpo, student)[~valid])
    whole = part.loss(student, old, TeacherScores(valid=student.loss_mask, sampled=teacher), advantages)
    assert torch.equal(loss[valid], whole[valid])
    assert torch.equal(gradient(loss, student)[valid], gradient(whole, student)[valid])
    assert (part.diagnostics(student, old, scores, advantages)["teacher_clamped"][~valid] == 0).all()


def test_shares_at_the_clamp_and_the_clips_are_logged() -> None:
    student, old, teacher, advantages = case()
    found = TRRD().diagnostics(student, old, TeacherScores(valid=student.loss_mask, sampled=teacher), advantages)
    mask = student.loss_mask
    assert set(found) == {"ratio", "clipped_high", "clipped_low", "reverse_kl_to_old", "teacher_clamped"}
    bound = ((student.logprobs - teacher).abs() > 1)[mask].float().mean()
    assert found["teacher_clamped"][mask].mean() == bound and 0.3 < bound < 1
    for name in ("clipped_high", "clipped_low"):
        assert 0 < found[name][mask].mean() < 1
    free = TRRD(clamp=None).diagnostics(student, old, TeacherScores(valid=mask, sampled=teacher), advantages)
    assert (free["teacher_clamped"] == 0).all()


def test_each_temperature_has_its_own_student_logprobs() -> None:
    sampling, distil = (torch.full((1, 1), x, requires_grad=True) for x in (-2.0, -1.0))
    student = StudentScores(loss_mask=torch.ones(1, 1, dtype=torch.bool), logprobs=sampling, distil_logprobs=distil)
    scores = TeacherScores(valid=student.loss_mask, sampled=torch.full((1, 1), -1.2))
    part = TRRD(alpha=0.25, clip_high=9.0)
    loss = part.loss(student, torch.full((1, 1), -2.4), scores, torch.ones(1, 1))
    ratio = math.exp(0.25 * 0.4 + 0.75 * 0.2)
    assert loss.item() == pytest.approx(-ratio)
    gradients = torch.autograd.grad(loss.sum(), (sampling, distil))
    assert [g.item() for g in gradients] == pytest.approx([-0.25 * ratio, -0.75 * ratio])


def test_published_defaults() -> None:
    part = TRRD()
    assert (part.alpha, part.clamp, part.clamp_grad) == (0.5, 1.0, "differentiable")
    assert (part.std, part.correction, part.eps, part.aggregation) == (True, 0, 0.0, "sequence")
    assert (part.clip_low, part.clip_high, part.dual_clip) == (0.2, 0.28, None)
    assert part.needs == ScoreRequest(sampled=True) and GRPO().needs == ScoreRequest()
    rewards = reward_output(4, [1.0, 0.0, 0.0, 0.0])
    got = part.advantages(rollout_batch({"1=": ["1", "2", "3", "4"]}), rewards, None)[:, 2]
    assert got.tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rel=1e-6)


def test_without_an_epsilon_equal_rewards_are_still_nothing() -> None:
    rewards = reward_output(4, [0.1, 0.1, 0.1, 0.1])
    assert (TRRD().advantages(rollout_batch({"1=": ["1", "2", "3", "4"]}), rewards, None) == 0).all()


def test_scheduled_alpha_changes_a_copy() -> None:
    student, old, teacher, advantages = case()
    scores, part = TeacherScores(valid=student.loss_mask, sampled=teacher), TRRD()
    changed = part.at({"alpha": 1.0}).loss(student, old, scores, advantages)
    assert torch.equal(changed, GRPO(clip_high=0.28).loss(student, old, None, advantages)) and part.alpha == 0.5


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        ({"alpha": 1.5}, "alpha", "between 0 (the teacher alone) and 1 (GRPO)"),
        ({"alpha": -0.1}, "alpha", "between 0 (the teacher alone) and 1 (GRPO)"),
        ({"clamp": 0.0}, "clamp", "above 0 nats, or null for none"),
        ({"clamp_grad": "straight"}, "clamp_grad", "differentiable, through or detached"),
        ({"clip_low": 2.0}, "clip_low", "between 0 and 1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        TRRD(**arguments)
    assert str(error.value) == f"model.objective.{name}\n    got:      {arguments[name]}\n    expected: {expected}"


@pytest.mark.parametrize(
    "scores", [None, TeacherScores(valid=torch.ones(8, 40, dtype=torch.bool))], ids=["no", "empty"]
)
def test_missing_teacher_is_named(scores: TeacherScores | None) -> None:
    student, old, _, advantages = case()
    with pytest.raises(ContractError) as error:
        TRRD().loss(student, old, scores, advantages)
    assert str(error.value) == (
        "TRRD: the teacher's log-probs of the sampled tokens\n    expected: TeacherScores.sampled [n, L]"
    )
