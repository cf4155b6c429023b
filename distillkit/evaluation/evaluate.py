"""Answer a batch of problems and judge the answers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from distillkit.components import RewardFn, RolloutSampler, StudentInfo
from distillkit.errors import ContractError, problem
from distillkit.evaluation.results import CompletionResult, ProblemResult
from distillkit.types import (
    CORRECT,
    UNKNOWN,
    RewardOutput,
    RolloutBatch,
    RolloutGroup,
    SampleRequest,
    SamplingSettings,
)

if TYPE_CHECKING:
    from distillkit.data.streams import EvalBatch

__all__ = ["FORMAT_REWARD", "evaluate_batch", "gather_results"]

FORMAT_REWARD = "format"
"""Name of the reward whose positive values count as "in format"."""


@torch.no_grad()
def evaluate_batch(
    batch: EvalBatch,
    *,
    sampler: RolloutSampler,
    rewards: Sequence[RewardFn],
    student_info: StudentInfo,
    seed: int,
    policy_version: int = 0,
) -> list[ProblemResult]:
    """Sample `k` completions per problem and judge them.

    A problem's draws depend on `seed`, the set and the problem alone: not on the batch, the rank or the step. The
    sampler must have been given the weights (`sync`).

    Args:
        batch: problems of one evaluation set.
        sampler: draws the completions, with the set's own settings; its `evaluator` does.
        rewards: judge them; with none, nothing is known to be correct.
        student_info: for the padding id.
        seed: of the run.
        policy_version: update count of the sampling weights.

    Returns:
        One result per problem, in the order of the batch; `valid` is passed on.

    Raises:
        ContractError: the sampler returned other groups than were asked for.
    """
    chosen = batch.eval_set
    settings = SamplingSettings(
        group_size=chosen.k,
        max_new_tokens=chosen.max_new_tokens or sampler.settings.max_new_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
    )
    requests = [
        SampleRequest(
            prompt_ids=prompt.prompt_ids,
            prompt=prompt.prompt,
            row=prompt.row,
            group_id=prompt.index,
            seed=_problem_seed(seed, chosen.name, prompt.index),
            settings=settings,
            policy_version=policy_version,
        )
        for prompt in batch.prompts
    ]
    groups = _in_order(requests, list(sampler.evaluator.sample(requests)))
    rollouts = RolloutBatch.from_groups(groups, pad_id=student_info.pad_token_id)
    judged = RewardOutput.merge([reward(rollouts) for reward in rewards]) if rewards else None
    completions = _completions(rollouts, judged)
    return [
        ProblemResult(
            set_name=chosen.name,
            index=prompt.index,
            prompt=prompt.prompt,
            gold=prompt.row.get(chosen.gold),
            completions=tuple(completions[i * chosen.k : (i + 1) * chosen.k]),
            valid=valid,
        )
        for i, (prompt, valid) in enumerate(zip(batch.prompts, batch.valid, strict=True))
    ]


def gather_results(results: Sequence[ProblemResult]) -> list[ProblemResult]:
    """Return the results of all ranks, each problem once, by index. Collective when several processes run."""
    parts = [list(results)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, list(results))
    distinct: dict[int, ProblemResult] = {}
    for result in (r for part in parts for r in part if r.valid):
        distinct.setdefault(result.index, result)
    return [distinct[index] for index in sorted(distinct)]


def _problem_seed(seed: int, set_name: str, index: int) -> int:
    digest = hashlib.sha256(f"eval/{seed}/{set_name}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _in_order(requests: Sequence[SampleRequest], groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    found = {group.request.group_id: group for group in groups}
    wanted = [request.group_id for request in requests]
    sizes = {len(group.rollouts) for group in groups}
    if len(groups) != len(wanted) or found.keys() != set(wanted) or sizes != {requests[0].settings.group_size}:
        got = f"groups {sorted(found)} of {sorted(sizes)} rollouts"
        expected = f"groups {sorted(wanted)} of {requests[0].settings.group_size} rollouts"
        raise ContractError(problem("model.sampler: other groups than were asked for", got=got, expected=expected))
    return [found[group_id] for group_id in wanted]


def _completions(rollouts: RolloutBatch, judged: RewardOutput | None) -> list[CompletionResult]:
    lengths, truncated = rollouts.completion_lengths.tolist(), rollouts.truncated.tolist()
    results = []
    for i, text in enumerate(rollouts.texts):
        values: dict[str, float | None] = {}
        status: dict[str, str] = {}
        correct = answer = None
        if judged is not None:
            for r, name in enumerate(judged.names):
                value = float(judged.values[i, r])
                values[name] = value if math.isfinite(value) else None
                status[name] = judged.status[r][i]
            verdict = int(judged.correct[i])
            correct = None if verdict == UNKNOWN else verdict == CORRECT
            answer = judged.answers[i]
        results.append(
            CompletionResult(
                text=text,
                correct=correct,
                answer=answer,
                truncated=truncated[i],
                length=lengths[i],
                format_ok=_format_ok(values, status, answer),
                rewards=values,
                status=status,
            )
        )
    return results


def _format_ok(values: dict[str, float | None], status: dict[str, str], answer: str | None) -> bool | None:
    if FORMAT_REWARD in values:
        value = values[FORMAT_REWARD]
        return None if value is None else value > 0
    if "unparseable" in status.values():
        return False
    return True if answer is not None else None
