"""The sampler's engine against the trainer, before and after a sync."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.checkup.checks import Finding
from distillkit.checkup.patient import Patient
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, SamplingSettings

__all__ = ["engine_gap"]

_LIMIT = 0.1
"""Nats/token, where the sampler has no `max_engine_gap` of its own."""

_NEW_TOKENS = 24


def engine_gap(patient: Patient) -> Finding:
    """Sample, change the trainer's weights, hand them over, sample again: the engine has to follow."""
    name, sampler = "engine", patient.module.sampler
    if sampler is None:
        return Finding(name=name, verdict="pass", text="no sampler to look at")
    scorer, temperature = patient.scorer, sampler.temperature or 1.0
    plan = ScorePlan(sampling_temperature=temperature, distil_temperature=temperature)
    kept = {key: value.detach().clone() for key, value in scorer.named_parameters()}
    sampler.setup(patient.info)
    try:
        first = _sampled(patient)
        _move(scorer)
        second = _sampled(patient)
        if first is None or second is None:
            return Finding(name=name, verdict="warn", text=f"{type(sampler).__name__} gives no log-probs to compare")
        after = _gap(patient, plan, second)
        _restore(scorer, kept)
        before, stale = _gap(patient, plan, first), _gap(patient, plan, second)
    finally:
        sampler.teardown()
        _restore(scorer, kept)
    limit = sampler.max_engine_gap or _LIMIT
    text = f"{type(sampler).__name__} and trainer differ by {before:.2g} nats/token, {after:.2g} after new weights"
    if before > limit:
        advice = "another model.sampler.temperature, dtype or engine: the two do not compute the same"
        return Finding(name=name, verdict="fail", text=f"{text}, above {limit:g}", advice=advice)
    if after > min(limit, stale):
        text += f" and {stale:.2g} from the weights before them"
        return Finding(name=name, verdict="fail", text=text, advice="model.sampler: hf; the weights did not arrive")
    return Finding(name=name, verdict="pass", text=text)


def _sampled(patient: Patient) -> RolloutBatch | None:
    """Rollouts of the engine with the student's weights, None where it does not say their log-probs."""
    sampler = patient.module.sampler
    settings = SamplingSettings(
        group_size=2, max_new_tokens=min(_NEW_TOKENS, sampler.max_new_tokens), temperature=sampler.temperature or 1.0
    )
    with patient.computing():
        sampler.sync(patient.scorer)
        groups = sorted(sampler.sample(patient.requests(settings)), key=lambda group: group.request.group_id)
    batch = RolloutBatch.from_groups(groups, patient.info.pad_token_id).to(patient.device)
    return batch if bool((batch.loss_mask & ~batch.behaviour_logprobs.isnan()).any()) else None


def _gap(patient: Patient, plan: ScorePlan, batch: RolloutBatch) -> float:
    """Mean |log π − log μ| in nats/token: π the trainer as it is now, μ what the engine drew from."""
    known = batch.loss_mask & ~batch.behaviour_logprobs.isnan()
    with patient.computing():
        own = patient.scorer(batch, plan).logprobs
    return float((own - batch.behaviour_logprobs)[known].abs().mean())


def _move(scorer: StudentScorer) -> None:
    """Change every matrix that learns by a fifth of its spread (adapters start at 0): far more than an update does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in scorer.parameters():
            if value.requires_grad and value.dim() > 1:
                size = 0.2 * float(value.std()) or 0.02
                value.add_(torch.randn(value.shape, generator=generator).to(value), alpha=size)


def _restore(scorer: StudentScorer, kept: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in scorer.named_parameters():
            value.copy_(kept[key])
