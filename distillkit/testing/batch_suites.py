"""Conformance of the parts that see whole rollouts: masker and objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from distillkit.components import Aggregation, Masker, PolicyObjective
from distillkit.testing.constructor import check_common
from distillkit.testing.fakes import FakeTeacher, reward_output, rollout_batch
from distillkit.testing.findings import Findings, close, pad, permute
from distillkit.types import RewardOutput, RolloutBatch, ScoreRequest, StudentScores, TeacherScores, TokenWeights

__all__ = ["check_masker", "check_objective"]


def _inputs(needs: ScoreRequest, rollouts: RolloutBatch | None, rewards: RewardOutput | None) -> tuple[Any, Any, Any]:
    rollouts = rollout_batch(observation="#") if rollouts is None else rollouts
    rewards = reward_output(len(rollouts)) if rewards is None else rewards
    return rollouts, rewards, FakeTeacher(blind_to="4").score(rollouts, needs) if needs else None


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def check_masker(part: Masker, *, rollouts: RolloutBatch | None = None, rewards: RewardOutput | None = None) -> None:
    """Check a masker: factors per token, decided by content and not by place, and by `correct` rather than by reward.

    Args:
        part: the masker.
        rollouts: what to mask, when the part needs rows of its own.
        rewards: their rewards.

    Raises:
        ConformanceError: with every broken rule.
    """
    findings = Findings(part)
    check_common(findings, part)
    rollouts, rewards, scores = _inputs(part.needs, rollouts, rewards)
    (n, length), order = rollouts.tokens.shape, _order(len(rollouts))
    with findings.rule("cannot be called with what it needs"):
        with findings.untouched(rollouts, rewards, scores):
            weights = part(rollouts, rewards, scores)
        text = f"returns {type(weights).__name__}, not TokenWeights"
        if not findings.expect(isinstance(weights, TokenWeights), text):
            findings.finish()
        for name in ("policy", "distil"):
            factor = getattr(weights, name)
            got = f"TokenWeights.{name} is {factor.dtype} {list(factor.shape)}"
            if findings.expect(factor.shape == (n, length), f"{got}, not [N, L]"):
                findings.expect(factor.dtype == torch.float32, f"{got}, not float32")
                findings.expect(factor.isfinite().all() and (factor >= 0).all(), f"TokenWeights.{name} is not >= 0")
                findings.expect(not factor.requires_grad, f"TokenWeights.{name} carries gradient")

    def same(other: TokenWeights, policy: Tensor, distil: Tensor) -> bool:
        return close(other.policy, policy) and close(other.distil, distil)

    with findings.rule("other arrangements of the same rollouts"):
        arguments: tuple[Any, ...] = (rollouts, rewards, scores)
        moved = part(*(permute(x, order) for x in arguments))
        text = "a factor depends on the place of the rollout in the batch"
        findings.expect(same(moved, weights.policy[order], weights.distil[order]), text)
        wider = part(*(pad(x, length, 3) for x in arguments))
        text = "a factor depends on the padding"
        findings.expect(same(wider, wider.policy, wider.distil), text)
        findings.expect(close(wider.policy[:, :length], weights.policy), text)
        findings.expect(close(wider.distil[:, :length], weights.distil), text)
        renamed = part(replace(rollouts, group_id=51 - 7 * rollouts.group_id), rewards, scores)
        text = "a factor depends on the number of a group"
        findings.expect(same(renamed, weights.policy, weights.distil), text)
        shifted = part(rollouts, replace(rewards, values=rewards.values + 5.0), scores)
        text = "a factor depends on the reward's value where correctness is the same: decide by rewards.correct"
        findings.expect(same(shifted, weights.policy, weights.distil), text)
    findings.finish()


def check_objective(
    part: PolicyObjective, *, rollouts: RolloutBatch | None = None, rewards: RewardOutput | None = None
) -> None:
    """Check an objective: advantages per group, and a per-token loss whose gradient has the right sign and reach.

    Args:
        part: the objective.
        rollouts: what was sampled, when the part needs rows of its own; one rollout's reward should be NaN.
        rewards: their rewards.

    Raises:
        ConformanceError: with every broken rule.
    """
    findings = Findings(part)
    check_common(findings, part)
    findings.expect(part.aggregation in get_args(Aggregation), f"aggregation is {part.aggregation!r}")
    length = part.constant_length
    findings.expect(length is None or length >= 1, f"constant_length is {length!r}")
    rollouts, rewards, scores = _inputs(part.needs, rollouts, rewards)
    sound = len(findings.failures)
    with findings.rule("advantages"):
        advantages = _advantages(findings, part, rollouts, rewards, scores)
    if len(findings.failures) == sound:
        with findings.rule("loss"):
            _loss(findings, part, rollouts, scores, advantages)
        with findings.rule("sign of the loss"):
            _direction(findings, part, rollouts, advantages)
    findings.finish()


def _advantages(
    findings: Findings,
    part: PolicyObjective,
    rollouts: RolloutBatch,
    rewards: RewardOutput,
    scores: TeacherScores | None,
) -> Tensor:
    (n, length), order = rollouts.tokens.shape, _order(len(rollouts))
    with findings.untouched(rollouts, rewards, scores):
        got = part.advantages(rollouts, rewards, scores)
    if not findings.expect(got.shape == (n, length), f"advantages are {list(got.shape)}, not [N, L]"):
        findings.finish()
    findings.expect(got.dtype == torch.float32, f"advantages are {got.dtype}, not float32")
    findings.expect(not got.requires_grad, "advantages carry gradient")
    findings.expect(got.isfinite().all(), "advantages are not finite")
    findings.expect((got[~rollouts.loss_mask] == 0).all(), "advantages are not 0 off loss_mask")
    findings.expect((got[rewards.total.isnan()] == 0).all(), "a rollout that was not scored has an advantage")
    findings.expect((got != 0).any(), "every advantage is 0, with rewards that differ")
    arguments: tuple[Any, ...] = (rollouts, rewards, scores)
    moved = part.advantages(*(permute(x, order) for x in arguments))
    findings.expect(close(moved, got[order]), "an advantage depends on the place of the rollout in the batch")
    wider = part.advantages(*(pad(x, length, 3) for x in arguments))
    findings.expect(close(wider[:, :length], got), "an advantage depends on the padding")
    renamed = part.advantages(replace(rollouts, group_id=51 - 7 * rollouts.group_id), rewards, scores)
    findings.expect(close(renamed, got), "an advantage depends on the number of a group")
    nothing = part.advantages(rollouts, replace(rewards, values=torch.full_like(rewards.values, torch.nan)), scores)
    findings.expect((nothing == 0).all(), "advantages are not 0 when nothing was scored")
    return got


def _student(rollouts: RolloutBatch, logprobs: Tensor) -> StudentScores:
    """Scores whose gradients can be asked for; the same numbers at both temperatures."""
    masked = torch.where(rollouts.loss_mask, logprobs, 0.0)
    return StudentScores(
        loss_mask=rollouts.loss_mask,
        logprobs=masked.clone().requires_grad_(),
        distil_logprobs=masked.clone().requires_grad_(),
    )


def _reached(loss: Tensor, student: StudentScores) -> Tensor:
    """The gradient of Σ loss in the student's log-probs, whichever of the two carries it."""
    gradients = torch.autograd.grad(
        loss.sum(), [student.logprobs, student.distil_logprobs], allow_unused=True, retain_graph=True
    )
    return torch.stack([g for g in gradients if g is not None]).sum(0)


def _loss(
    findings: Findings,
    part: PolicyObjective,
    rollouts: RolloutBatch,
    scores: TeacherScores | None,
    advantages: Tensor,
) -> None:
    n, length = rollouts.tokens.shape
    draw = torch.rand(2, n, length, generator=torch.Generator().manual_seed(1))
    old = torch.where(rollouts.loss_mask, -0.2 - 2 * draw[0], 0.0)
    student = _student(rollouts, old + 0.3 * (draw[1] - 0.5))  # inside and outside of the usual clips
    given = old.clone().requires_grad_()
    teacher = None
    if scores is not None and scores.sampled is not None:
        teacher = scores.sampled.clone().requires_grad_()
        scores = replace(scores, sampled=teacher)
    with findings.untouched(student, given, scores, advantages):
        loss = part.loss(student, given, scores, advantages)
    if not findings.expect(loss.shape == (n, length), f"loss is {list(loss.shape)}, not [n, L]"):
        return
    findings.expect(loss.isfinite().all(), "loss is not finite")
    if not findings.expect(loss.requires_grad, "no gradient reaches the student's log-probs"):
        return
    gradient = _reached(loss, student)
    findings.expect((gradient != 0).any(), "no gradient reaches the student's log-probs")
    findings.expect(gradient.isfinite().all(), "the gradient is not finite")
    findings.expect((gradient[~rollouts.loss_mask] == 0).all(), "gradient reaches positions off loss_mask")
    findings.expect((gradient[(advantages == 0).all(dim=1)] == 0).all(), "a rollout of advantage 0 has a gradient")
    others = [given] if teacher is None else [given, teacher]
    for leaked, name in zip(
        torch.autograd.grad(loss.sum(), others, allow_unused=True, retain_graph=True),
        ("old log-probs", "teacher's scores"),
        strict=False,
    ):
        findings.expect(leaked is None or bool((leaked == 0).all()), f"gradient flows into the {name}")
    _arrangements(findings, part, (student, old, scores, advantages), loss.detach())
    _logged(findings, part, (student, old, scores, advantages))


def _arrangements(findings: Findings, part: PolicyObjective, arguments: tuple[Any, ...], loss: Tensor) -> None:
    n, length = loss.shape
    order = _order(n)
    moved = part.loss(*(permute(x, order) for x in arguments))
    findings.expect(close(moved, loss[order]), "a loss depends on the place of the rollout in the batch")
    wider = part.loss(*(pad(x, length, 3) for x in arguments))
    findings.expect(close(wider[:, :length], loss), "a loss depends on the padding")
    one = torch.tensor([1])
    student, old, scores, advantages = arguments
    part_of = replace(student, **{k: getattr(student, k)[one] for k in ("loss_mask", "logprobs", "distil_logprobs")})
    own = None if scores is None else scores.select(one, length)
    alone = part.loss(part_of, old[one], own, advantages[one])
    findings.expect(close(alone, loss[one]), "a loss depends on the other rollouts of its micro-batch")


def _logged(findings: Findings, part: PolicyObjective, arguments: tuple[Any, ...]) -> None:
    shape = arguments[1].shape
    for name, values in part.diagnostics(*arguments).items():
        findings.expect(values.shape == shape, f"diagnostics[{name!r}] is {list(values.shape)}, not [n, L]")
        findings.expect(not values.requires_grad, f"diagnostics[{name!r}] carries gradient")
        findings.expect(values.isfinite().all(), f"diagnostics[{name!r}] is not finite")


def _direction(findings: Findings, part: PolicyObjective, rollouts: RolloutBatch, advantages: Tensor) -> None:
    """On-policy, with a teacher who agrees, descending must raise tokens of positive advantage and lower the others."""
    old = torch.where(rollouts.loss_mask, torch.full(rollouts.tokens.shape, -1.0), 0.0)
    scores = TeacherScores(valid=rollouts.loss_mask, sampled=old) if part.needs else None
    if part.needs and replace(part.needs, sampled=False):
        return  # it reads more of the teacher than this rule can make up
    student = _student(rollouts, old)
    gradient = _reached(part.loss(student, old, scores, advantages), student)
    text = "descending the loss does not raise the log-probs of tokens with a positive advantage"
    findings.expect((gradient * advantages <= 0).all() and (gradient * advantages < 0).any(), text)
