"""From a prepared batch to optimizer steps: coefficients once, then micro-batches.

Whatever the split into micro-batches or ranks, the order, the padding or the head's chunk size, an update has the same
gradient: every denominator is counted over the whole update and all ranks before the first backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from distillkit.backends import StepBackend
from distillkit.components import Aggregation, DistillThrough, DivergenceEstimator, Masker, PolicyObjective
from distillkit.engine_gap import EngineGap
from distillkit.functional.aggregation import denominator, token_coefficients
from distillkit.functional.objectives import importance_weights
from distillkit.meters import Meters
from distillkit.micro_batches import MicroBatch, minibatches, split
from distillkit.models import ScorePlan
from distillkit.per_token import PerTokenRecord
from distillkit.types import RewardOutput, RolloutBatch, SamplingSettings, StudentScores, TeacherScores, TokenWeights

__all__ = ["PreparedBatch", "StepContext", "StepSettings", "UpdateResult", "old_policy_scores", "update"]

_Outcome = Literal["stepped", "not finite", "nothing to learn"]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The step's own numbers, named as in the YAML under `model`.

    `tokens_per_micro_batch` counts padding. `normalize: eligible` divides by the tokens before the masker, so that
    masking does not raise the effective β; `kept` by those after it. `distil_aggregation` None follows the objective
    (`token` without one). `importance_cap` truncates the correction of tokens that another policy sampled; None
    switches it off.
    `reward_shaping` says how a rollout's divergence enters its reward under `distill_through: reward`.
    """

    distill_through: DistillThrough = "loss"
    inner_epochs: int = 1
    minibatches: int = 1
    tokens_per_micro_batch: int = 16384
    max_grad_norm: float | None = 1.0
    distil_temperature: float = 1.0
    policy_weight: float = 1.0
    normalize: Literal["eligible", "kept"] = "eligible"
    distil_aggregation: Aggregation | None = None
    reward_shaping: Literal["mean", "sum"] = "mean"
    importance_cap: float | None = 2.0
    skip_zero_weight: bool = True
    one_step_off: bool = False


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The parts and scalars of one step, schedules applied."""

    step: int
    sampling: SamplingSettings
    objective: PolicyObjective | None
    divergence: DivergenceEstimator | None
    masker: Masker | None
    reference_divergence: DivergenceEstimator | None
    beta: float
    reference_beta: float
    policy_weight: float
    distil_temperature: float
    scheduled: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return the scheduled numbers by metric name."""
        betas = {"train/beta": self.beta} if self.divergence is not None else {}
        if self.reference_divergence is not None:
            betas["train/reference_beta"] = self.reference_beta
        return {**betas, **{f"schedule/{path}": value for path, value in self.scheduled.items()}}


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedBatch:
    """Everything decided before the first backward; [N, L] float32 grids, detached.

    `old_logprobs` is None when the first forward of the only update gives them; `frozen_divergence` is the divergence
    of the old policy, where the distillation goes through an advantage or a reward and a pass was needed to know it.
    Without `same_engine`, the distance between sampler and trainer is recorded, as `train/staleness_gap` where weights
    sampled that are `stale`, else as `train/engine_gap`; `max_engine_gap` stops a run where it is more nats/token.
    """

    rollouts: RolloutBatch
    rewards: RewardOutput | None
    teacher: TeacherScores | None
    reference: TeacherScores | None
    weights: TokenWeights
    context: StepContext
    plan: ScorePlan
    same_engine: bool
    max_engine_gap: float | None = None
    stale: bool = False
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    scored: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    old_logprobs: Tensor | None = None
    frozen_divergence: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateResult:
    """`per_token`: name -> [N, L] float32, NaN where not computed; `tokens` sent through the student.

    `skipped` updates were not finite; neither they nor updates without anything to learn from count as `updates`.
    """

    per_token: Mapping[str, Tensor]
    updates: int
    skipped: int
    tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Coefficients:
    """The detached factor [N, L] of each loss term.

    `learning` [N] marks the rollouts with a factor that is not 0, `sent` [n] lists those that go through the student.
    """

    policy: Tensor
    distil: Tensor
    reference: Tensor
    learning: Tensor
    sent: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Correction:
    """Truncated importance weights [n, L] of each loss term, detached."""

    policy: Tensor
    distil: Tensor
    reference: Tensor


def update(
    batch: PreparedBatch, settings: StepSettings, device: torch.device, backend: StepBackend, meters: Meters
) -> UpdateResult:
    """Run `inner_epochs × minibatches` optimizer steps on one batch.

    One that is not finite on some rank, or from which no rank has anything to learn, is dropped on every rank: an
    optimizer with momentum or weight decay would move the weights on a gradient of 0 too. Metrics are means over the
    tokens of rollouts that are learned from, whether or not the others are sent through the student.
    """
    record = PerTokenRecord(batch)
    metric = "train/staleness_gap" if batch.stale else "train/engine_gap"
    gap = None if batch.same_engine else EngineGap(batch.rollouts, batch.max_engine_gap, metric)
    outcomes: Counter[_Outcome] = Counter()
    tokens = 0
    for epoch in range(settings.inner_epochs):
        seed = batch.context.step * settings.inner_epochs + epoch
        for rows in minibatches(batch.rollouts, settings.minibatches, seed, backend):
            first = epoch == 0
            coefficients = _coefficients(batch, settings, rows, backend)
            total = torch.zeros((), dtype=torch.float64, device=device)
            parts = list(split(batch.rollouts, coefficients.sent, settings.tokens_per_micro_batch, backend))
            for i, part in enumerate(parts):
                loss, scores = _loss(batch, settings, coefficients, part, backend, meters if first else Meters())
                backend.backward(loss * backend.world_size, last=i == len(parts) - 1)
                total += loss.detach().double()
                if part.real:
                    tokens += int(batch.rollouts.lengths[part.index].sum())
                    if first:
                        record.keep(part.index, scores)
                    if gap is not None:
                        gap.add(part.index, _old(batch, scores, part.index))
            if gap is not None:
                gap.check(batch.context.step, backend, meters)
                gap = None  # the first update's rollouts, before any weight has moved
            outcomes[_finish(total, coefficients.learning, settings, backend, meters)] += 1
    meters.add_count("train/skipped_updates", outcomes["not finite"] / backend.world_size)
    meters.add_count("train/empty_updates", outcomes["nothing to learn"] / backend.world_size)
    updates, skipped = outcomes["stepped"], outcomes["not finite"]
    return UpdateResult(per_token=record.grids, updates=updates, skipped=skipped, tokens=tokens)


@torch.no_grad()
def old_policy_scores(
    batch: PreparedBatch, settings: StepSettings, device: torch.device, backend: StepBackend
) -> StudentScores:
    """Score the whole batch with the weights that sampled it, before the first update changes them."""
    shape = batch.rollouts.tokens.shape
    logprobs, divergence = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    everything = torch.arange(len(batch.rollouts), device=device)
    for part in split(batch.rollouts, everything, settings.tokens_per_micro_batch, backend):
        scores = _forward(batch, part, backend, batch.plan)
        if not part.real:
            continue
        length = scores.logprobs.shape[1]
        logprobs[part.index, :length] = scores.logprobs
        if scores.divergence is not None:
            divergence[part.index, :length] = scores.divergence
    return StudentScores(
        loss_mask=batch.rollouts.loss_mask, logprobs=logprobs, distil_logprobs=logprobs, divergence=divergence
    )


def _coefficients(batch: PreparedBatch, settings: StepSettings, rows: Tensor, backend: StepBackend) -> _Coefficients:
    mask = batch.rollouts.loss_mask & rows[:, None]
    context, objective = batch.context, batch.context.objective
    inline = settings.distill_through == "advantage" and batch.plan.divergence is not None
    nothing = torch.zeros_like(mask)
    ones = torch.ones_like(batch.weights.policy)
    taught = nothing if batch.teacher is None else mask & batch.teacher.valid
    scored = mask & batch.scored[:, None]
    as_loss = settings.distill_through == "loss" and batch.plan.divergence is not None
    terms = {
        "policy": (
            nothing if objective is None else (scored | taught if inline else scored),
            ones if inline else batch.weights.policy,
            "token" if objective is None else objective.aggregation,
        ),
        "distil": (taught if as_loss else nothing, batch.weights.distil, _distil_aggregation(settings, objective)),
        "reference": (
            mask & batch.reference.valid if batch.reference is not None and context.reference_beta else nothing,
            ones,
            "token" if objective is None else objective.aggregation,
        ),
    }
    if settings.normalize == "kept":
        kept = {k: eligible & (weights != 0) for k, (eligible, weights, _) in terms.items()}
        if inline:  # one advantage holds both terms, each with its own weight
            kept["policy"] = scored & (batch.weights.policy != 0) | taught & (batch.weights.distil != 0)
        terms = {k: (kept[k], weights, how) for k, (_, weights, how) in terms.items()}
    constant = batch.rollouts.settings.max_new_tokens
    if objective is not None and objective.constant_length is not None:
        constant = objective.constant_length
    counts = torch.stack([denominator(eligible, how, constant) for eligible, _, how in terms.values()])
    totals = backend.all_reduce(counts, "sum").tolist()
    policy, distil, reference = (
        token_coefficients(eligible, weights, how, total)
        for (eligible, weights, how), total in zip(terms.values(), totals, strict=True)
    )
    distil, reference = distil * context.beta, reference * context.reference_beta
    rewarded = batch.advantages * batch.weights.policy != 0
    learns = rewarded | (taught & (batch.weights.distil * context.beta != 0) if inline else nothing)
    active = ((policy != 0) & learns) | (distil != 0) | (reference != 0)
    learning = active.any(dim=1)
    sent = (learning if settings.skip_zero_weight else rows).nonzero().squeeze(1)
    return _Coefficients(policy=policy, distil=distil, reference=reference, learning=learning, sent=sent)


def _distil_aggregation(settings: StepSettings, objective: PolicyObjective | None) -> Aggregation:
    if settings.distil_aggregation is not None:
        return settings.distil_aggregation
    return "token" if objective is None else objective.aggregation


def _forward(batch: PreparedBatch, part: MicroBatch, backend: StepBackend, plan: ScorePlan) -> StudentScores:
    index, plan = part.index, replace(plan, most_tokens=part.most_tokens)
    rollouts = batch.rollouts.select(index)
    length = rollouts.tokens.shape[1]
    teacher, reference = (None if s is None else s.select(index, length) for s in (batch.teacher, batch.reference))
    return backend.score(rollouts, plan, teacher, reference)


def _loss(
    batch: PreparedBatch,
    settings: StepSettings,
    coefficients: _Coefficients,
    part: MicroBatch,
    backend: StepBackend,
    meters: Meters,
) -> tuple[Tensor, StudentScores]:
    """Return the micro-batch's share of the update's loss, and the scores it came from."""
    index, context = part.index, batch.context
    # A frozen divergence is the old policy's: it is not computed again at every inner epoch.
    frozen = batch.frozen_divergence
    scores = _forward(batch, part, backend, batch.plan if frozen is None else replace(batch.plan, divergence=None))
    length = scores.logprobs.shape[1]
    cut = (index, slice(None, length))
    teacher = None if batch.teacher is None else batch.teacher.select(index, length)
    old = _old(batch, scores, index)
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
    return loss, scores


def _old(batch: PreparedBatch, scores: StudentScores, index: Tensor) -> Tensor:
    """Log-probs [n, L] of the policy before the first update, detached."""
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


def _finish(total: Tensor, learning: Tensor, settings: StepSettings, backend: StepBackend, meters: Meters) -> _Outcome:
    """Clip and step, unless loss or gradient is not finite on some rank or no rank has anything to learn."""
    norm = backend.clip_and_norm(settings.max_grad_norm)
    finite = torch.isfinite(total) & torch.isfinite(norm)
    votes = torch.stack([finite, ~learning.any()]).to(torch.int64)
    all_finite, none_learns = backend.all_reduce(votes, "min").tolist()
    if all_finite:
        meters.add_sum("train/grad_norm", float(norm), 1.0)
    if all_finite and not none_learns:
        backend.optimizer_step()
    backend.zero_grad()
    if not all_finite:
        return "not finite"
    return "nothing to learn" if none_learns else "stepped"
