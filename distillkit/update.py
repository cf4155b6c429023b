"""From a prepared batch to optimizer steps: coefficients once, then micro-batches.

Whatever the split into micro-batches or ranks, the order, the padding or the head's chunk size, an update has the same
gradient: every denominator is counted over the whole update and all ranks before the first backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from distillkit.backends import StepBackend
from distillkit.components import Aggregation, PolicyObjective
from distillkit.engine_gap import EngineGap
from distillkit.functional.aggregation import denominator, token_coefficients
from distillkit.loss import loss_of, old_logprobs_of
from distillkit.meters import Meters
from distillkit.micro_batches import MicroBatch, minibatches, split
from distillkit.per_token import PerTokenRecord
from distillkit.prepared import Coefficients, PreparedBatch, StepSettings
from distillkit.scorer import ScorePlan
from distillkit.types import StudentScores

__all__ = ["UpdateResult", "old_policy_scores", "update"]

_Outcome = Literal["stepped", "not finite", "nothing to learn"]


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateResult:
    """`per_token`: name -> [N, L] float32, NaN where not computed; `tokens` sent through the student.

    `skipped` updates were not finite; neither they nor updates without anything to learn from count as `updates`.
    """

    per_token: Mapping[str, Tensor]
    updates: int
    skipped: int
    tokens: int


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
            budget, batching = settings.tokens_per_micro_batch, settings.batching
            parts = list(split(batch.rollouts, coefficients.sent, budget, batching, backend))
            for i, part in enumerate(parts):
                loss, scores = _loss(batch, settings, coefficients, part, backend, meters if first else Meters())
                backend.backward(loss * backend.world_size, last=i == len(parts) - 1)
                total += loss.detach().double()
                if part.real:
                    tokens += int(batch.rollouts.lengths[part.index].sum())
                    if first:
                        record.keep(part.index, scores)
                    if gap is not None:
                        gap.add(part.index, old_logprobs_of(batch, scores, part.index))
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
    for part in split(batch.rollouts, everything, settings.tokens_per_micro_batch, settings.batching, backend):
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


def _coefficients(batch: PreparedBatch, settings: StepSettings, rows: Tensor, backend: StepBackend) -> Coefficients:
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
    return Coefficients(policy=policy, distil=distil, reference=reference, learning=learning, sent=sent)


def _distil_aggregation(settings: StepSettings, objective: PolicyObjective | None) -> Aggregation:
    if settings.distil_aggregation is not None:
        return settings.distil_aggregation
    return "token" if objective is None else objective.aggregation


def _forward(
    batch: PreparedBatch,
    part: MicroBatch,
    backend: StepBackend,
    plan: ScorePlan,
    guess: Callable[[], StudentScores] | None = None,
) -> StudentScores:
    index, plan = part.index, replace(plan, most_tokens=part.most_tokens, packed=part.packed, guess=guess)
    rollouts = batch.rollouts.select(index)
    length = rollouts.tokens.shape[1]
    teacher, reference = (None if s is None else s.select(index, length) for s in (batch.teacher, batch.reference))
    return backend.score(rollouts, plan, teacher, reference)


def _loss(
    batch: PreparedBatch,
    settings: StepSettings,
    coefficients: Coefficients,
    part: MicroBatch,
    backend: StepBackend,
    meters: Meters,
) -> tuple[Tensor, StudentScores]:
    """Return the micro-batch's share of the update's loss, and the scores it came from."""
    # A frozen divergence is the old policy's: it is not computed again at every inner epoch.
    plan = batch.plan if batch.frozen_divergence is None else replace(batch.plan, divergence=None)
    # At the first update every ratio of new to old policy is 1, so most losses are linear in what they are made of.
    expected = partial(_expected_gradient, batch, settings, coefficients, part, backend)
    guess = expected if batch.old_logprobs is None else None
    scores = _forward(batch, part, backend, plan, guess)
    return loss_of(batch, settings, coefficients, part, scores, meters), scores


def _expected_gradient(
    batch: PreparedBatch, settings: StepSettings, coefficients: Coefficients, part: MicroBatch, backend: StepBackend
) -> StudentScores:
    """Return the gradient that the loss will have in each score if it does not depend on their values.

    Whether it is right is seen after the scoring, see `distillkit.chunks.Guess`.
    """
    mask = batch.rollouts.loss_mask[part.index, : int(batch.rollouts.lengths[part.index].max())]
    plan, teacher = batch.plan, batch.teacher is not None
    wanted = {
        "logprobs": True,
        "distil_logprobs": plan.distil_temperature != plan.sampling_temperature,
        "divergence": teacher and plan.divergence is not None,
        "reference_divergence": batch.reference is not None and plan.reference_divergence is not None,
    }
    leaves = {
        key: torch.zeros(mask.shape, device=mask.device, requires_grad=True) for key, is_in in wanted.items() if is_in
    }
    stand_in = StudentScores(loss_mask=mask, **{"distil_logprobs": leaves["logprobs"], **leaves})
    loss = loss_of(batch, settings, coefficients, part, stand_in, Meters()) * backend.world_size
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    gradients = dict(zip(leaves, found, strict=True))
    return StudentScores(loss_mask=mask, **{"distil_logprobs": gradients["logprobs"], **gradients})


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
