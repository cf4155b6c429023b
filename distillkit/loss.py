"""The loss of a micro-batch from its scores: policy, distillation and reference term, each with its coefficients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distillkit.functional.objectives import importance_weights
from distillkit.meters import Meters
from distillkit.micro_batches import MicroBatch
from distillkit.prepared import Coefficients, PreparedBatch, StepSettings
from distillkit.types import StudentScores

__all__ = ["loss_of", "old_logprobs_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Correction:
    """Truncated importance weights [n, L] of each loss term, detached."""

    policy: Tensor
    distil: Tensor
    reference: Tensor


def loss_of(
    batch: PreparedBatch,
    settings: StepSettings,
    coefficients: Coefficients,
    part: MicroBatch,
    scores: StudentScores,
    meters: Meters,
) -> Tensor:
    """Return the micro-batch's share of the update's loss; `scores` [n, L] are those of its rollouts."""
    index, context = part.index, batch.context
    frozen = batch.frozen_divergence
    length = scores.logprobs.shape[1]
    cut = (index, slice(None, length))
    teacher = None if batch.teacher is None else batch.teacher.select(index, length)
    old = old_logprobs_of(batch, scores, index)
    learned = scores.loss_mask & coefficients.learning[index, None] & part.real
    loss = (scores.logprobs.sum() + scores.distil_logprobs.sum()) * 0.0
    divergence = scores.divergence if frozen is None else frozen[cut]
    correction = _off_policy(batch, settings, scores, old, cut)
    if context.objective is not None:
        advantages = _advantages(batch, settings, divergence, cut)
        policy = context.objective.loss(scores, old, teacher, advantages)
        factor = coefficients.policy[cut] * correction.policy * part.real
        loss = loss + _weighted(policy, factor)
        counted = learned & (coefficients.policy[cut] != 0)
        for name, values in context.objective.diagnostics(scores, old, teacher, advantages).items():
            meters.add(f"train/{name}", values, counted)
    if divergence is not None:
        counted = learned if teacher is None else learned & teacher.valid
        meters.add("train/divergence", divergence, counted)
        loss = loss + _weighted(divergence, coefficients.distil[cut] * correction.distil * part.real)
    if scores.reference_divergence is not None:
        meters.add("train/reference_divergence", scores.reference_divergence, learned)
        factor = coefficients.reference[cut] * correction.reference * part.real
        loss = loss + _weighted(scores.reference_divergence, factor)
    meters.add_count("train/loss", float(loss.detach()))
    return loss


def old_logprobs_of(batch: PreparedBatch, scores: StudentScores, index: Tensor) -> Tensor:
    """Return the log-probs [n, L] of the policy before the first update, detached."""
    if batch.old_logprobs is None:
        return scores.logprobs.detach()
    return batch.old_logprobs[index, : scores.logprobs.shape[1]]


def _weighted(values: Tensor, factor: Tensor) -> Tensor:
    # A value that does not count may be infinite; 0 · inf would spoil the sum and, through it, the gradient.
    return (torch.where(factor != 0, values, 0.0) * factor).sum()


def _advantages(
    batch: PreparedBatch, settings: StepSettings, divergence: Tensor | None, cut: tuple[Tensor, slice]
) -> Tensor:
    advantages = batch.advantages[cut]
    if settings.distill_through != "advantage" or divergence is None:
        return advantages
    taught = batch.context.beta * batch.weights.distil[cut] * divergence.detach()
    return advantages * batch.weights.policy[cut] - taught


def _off_policy(
    batch: PreparedBatch, settings: StepSettings, scores: StudentScores, old: Tensor, cut: tuple[Tensor, slice]
) -> _Correction:
    """Truncated importance weights.

    Old over behaviour for the objective, whose ratio holds the rest; current over behaviour for an estimator that sees
    sampled tokens only (whole distributions need none).
    """
    ones = torch.ones_like(old)
    cap = settings.importance_cap
    if cap is None:
        return _Correction(policy=ones, distil=ones, reference=ones)
    behaviour = old if batch.same_engine else batch.rollouts.behaviour_logprobs[cut]
    current = importance_weights(scores.logprobs, behaviour, cap)
    distil, reference = (
        current if part is not None and part.needs.sampled else ones
        for part in (batch.plan.divergence, batch.plan.reference_divergence)
    )
    policy = ones if batch.same_engine else importance_weights(old, behaviour, cap)
    return _Correction(policy=policy, distil=distil, reference=reference)
