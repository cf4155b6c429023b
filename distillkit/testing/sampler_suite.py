"""Conformance of samplers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.testing.constructor import check_common
from distillkit.testing.fakes import sample_requests, student_info, tiny_student
from distillkit.testing.findings import Findings, close
from distillkit.types import Rollout, RolloutGroup, SampleRequest

if TYPE_CHECKING:
    from distillkit.scorer import StudentScorer

__all__ = ["check_sampler"]


def check_sampler(
    part: RolloutSampler,
    *,
    requests: Sequence[SampleRequest] | None = None,
    student: StudentInfo | None = None,
    scorer: StudentScorer | None = None,
    draws: bool = True,
) -> None:
    """Check a sampler: a whole group per request, ends that are ends, log-probs that are the student's, draws by seed.

    Args:
        part: the sampler, not yet set up.
        requests: at least two prompts, all with the same settings.
        student: the student it is set up for.
        scorer: that student's weights, on the CPU.
        draws: whether completions are drawn here: by seed, by this version of the policy, to an end token or
            `max_new_tokens`. A recording's are not.

    Raises:
        ConformanceError: with every broken rule.
    """
    findings = Findings(part)
    check_common(findings, part)
    student = student_info() if student is None else student
    scorer = tiny_student() if scorer is None else scorer
    requests = sample_requests() if requests is None else requests
    weights = {name: value.clone() for name, value in scorer.state_dict().items()}
    with findings.rule("setup and sync"):
        part.setup(student)
        part.sync(scorer)
    try:
        with findings.rule("cannot sample"):
            groups = {group.request.group_id: group for group in part.sample(requests)}
            wanted = {request.group_id for request in requests}
            if findings.expect(groups.keys() == wanted, f"gives the groups {sorted(groups)}, not {sorted(wanted)}"):
                sound = len(findings.failures)
                for request in requests:
                    _group(findings, groups[request.group_id], request, student, draws)
                if len(findings.failures) == sound:
                    _logprobs(findings, groups.values(), scorer, student.vocab_limit)
                    _seeds(findings, part, requests, groups, draws)
        after = scorer.state_dict()
        same = all(torch.equal(value, after[name]) for name, value in weights.items())
        findings.expect(same, "changes the student's weights")
    finally:
        part.teardown()
    findings.finish()


def _group(findings: Findings, group: RolloutGroup, request: SampleRequest, student: StudentInfo, draws: bool) -> None:
    settings = request.settings
    count = len(group.rollouts)
    findings.expect(count == settings.group_size, f"gives {count} rollouts for a group of {settings.group_size}")
    findings.expect(group.request == request, "a group holds another request than it was asked for")
    for rollout in group.rollouts:
        ids, ends = rollout.completion_ids, set(student.eos_token_ids)
        if not findings.expect(len(ids) > 0, "a completion has no token at all"):
            continue
        findings.expect(ids.dtype == torch.int64, f"completion_ids are {ids.dtype}, not int64")
        findings.expect(rollout.loss_mask.dtype == torch.bool, f"loss_mask is {rollout.loss_mask.dtype}, not bool")
        findings.expect(((ids >= 0) & (ids < student.vocab_limit)).all(), "an id is at or beyond vocab_limit")
        findings.expect(len(ids) <= settings.max_new_tokens, "a completion is longer than max_new_tokens")
        sampled = ids[rollout.loss_mask].tolist()
        ended = bool(sampled) and sampled[-1] in ends and int(ids[-1]) in ends
        findings.expect(not ends & set(sampled[:-1]), "a completion goes on after its end token")
        text = "finish_reason 'stop' and the end token do not agree"
        findings.expect(ended == (rollout.finish_reason == "stop"), text)
        if rollout.finish_reason == "length" and draws:
            findings.expect(len(ids) == settings.max_new_tokens, "finish_reason is 'length' before max_new_tokens")
        versions = rollout.policy_version[rollout.loss_mask]
        known_versions = (request.policy_version,) if draws else (request.policy_version, -1)
        findings.expect(set(versions.tolist()) <= set(known_versions), "policy_version is not the request's")
        known = rollout.behaviour_logprobs[rollout.loss_mask]
        findings.expect((known[~known.isnan()] <= 1e-5).all(), "a behaviour log-prob is above 0")
        findings.expect(isinstance(rollout.text, str), "a completion has no text")


@torch.no_grad()
def _logprobs(findings: Findings, groups: Iterable[RolloutGroup], scorer: StudentScorer, limit: int) -> None:
    """Behaviour log-probs, where known, against a forward over prompt and completion."""
    for group in groups:
        prompt, temperature = group.request.prompt_ids, group.request.settings.temperature
        for rollout in group.rollouts:
            tokens = torch.cat([torch.tensor(prompt), rollout.completion_ids]).unsqueeze(0)
            logits: Tensor = scorer.model(input_ids=tokens).logits[0, len(prompt) - 1 : -1, :limit].float()
            logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
            own = logprobs.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
            known = rollout.loss_mask & ~rollout.behaviour_logprobs.isnan()
            text = "behaviour log-probs are not the student's at the sampling temperature (more than 1e-3 off)"
            findings.expect(close(rollout.behaviour_logprobs[known], own[known], 1e-3), text)


def _ids(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [rollout.completion_ids.tolist() for rollout in rollouts]


def _seeds(
    findings: Findings,
    part: RolloutSampler,
    requests: Sequence[SampleRequest],
    groups: dict[int, RolloutGroup],
    draws: bool,
) -> None:
    for request in requests:
        (alone,) = part.sample([request])
        same = _ids(alone.rollouts) == _ids(groups[request.group_id].rollouts)
        findings.expect(same, "a group's draws depend on the other requests of the call, or on earlier calls")
    if draws and requests[0].settings.temperature > 0:
        reseeded = [replace(request, seed=request.seed + 1000 + i) for i, request in enumerate(requests)]
        other = {group.request.group_id: group for group in part.sample(reseeded)}
        changed = any(_ids(other[i].rollouts) != _ids(groups[i].rollouts) for i in groups)
        findings.expect(changed, "the seeds of the requests change nothing")
