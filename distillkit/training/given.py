"""One batch of given completions to gradients, in torch alone.

The update is the one of `distillkit.update`: the completions are rollouts that someone else wrote, and the policy's
loss is their negative log-likelihood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from distillkit.backends import StepBackend
from distillkit.clock import PhaseClock
from distillkit.components import BetaScheduler, DivergenceEstimator, PolicyObjective, StudentInfo, TeacherScorer
from distillkit.data.prompts import PreparedPrompt
from distillkit.errors import DataError, problem
from distillkit.meters import Meters
from distillkit.prepared import PreparedBatch, StepContext, StepSettings
from distillkit.refusals import check_supervised
from distillkit.scorer import ScorePlan
from distillkit.types import (
    RewardOutput,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    SampleRequest,
    SamplingSettings,
    StepOutput,
    StudentScores,
    TeacherScores,
    TokenWeights,
)
from distillkit.update import update

__all__ = ["SupervisedStep", "given_rollouts"]

_PER_TOKEN = ("student_logprobs", "teacher_logprobs", "divergence")
"""Per-token values that mean something on tokens that the student did not sample."""


def given_rollouts(prompts: Sequence[PreparedPrompt], *, offset: int, student: StudentInfo) -> RolloutBatch:
    """Return given completions as rollouts, one per prompt: no sampling policy, so behaviour log-probs are NaN.

    Args:
        prompts: with `completion_ids`.
        offset: stream position of the first prompt; `group_id` counts from it.
        student: its tokenizer, vocabulary limit, and padding and end tokens.

    Raises:
        DataError: a completion holds a token that the model does not have.
    """
    longest = max(len(prompt.completion_ids or ()) for prompt in prompts)
    settings = SamplingSettings(group_size=1, max_new_tokens=longest)
    groups = [
        RolloutGroup(
            request=SampleRequest(
                prompt_ids=prompt.prompt_ids,
                prompt=prompt.prompt,
                row=prompt.row,
                group_id=offset + i,
                seed=0,
                settings=settings,
                policy_version=-1,
            ),
            rollouts=(_given(prompt, student),),
        )
        for i, prompt in enumerate(prompts)
    ]
    return RolloutBatch.from_groups(groups, student.pad_token_id).to(student.device)


def _given(prompt: PreparedPrompt, student: StudentInfo) -> Rollout:
    assert prompt.completion_ids is not None, "the data module was prepared without completions"
    if (largest := max(prompt.completion_ids)) >= student.vocab_limit:
        token = student.tokenizer.convert_ids_to_tokens(largest)
        where = f"data.train: row {prompt.index + 1}, column 'completion': a token that the model does not have"
        got, expected = f"{token!r}, id {largest}", f"ids below {student.vocab_limit}"
        raise DataError(problem(where, got=got, expected=expected, hint="a tokenizer that fits model.student"))
    ids = torch.tensor(prompt.completion_ids)
    stopped = prompt.completion_ids[-1] in student.eos_token_ids
    return Rollout(
        completion_ids=ids,
        behaviour_logprobs=torch.full(ids.shape, float("nan")),
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        policy_version=torch.full_like(ids, -1),
        finish_reason="stop" if stopped else "length",
        text=str(student.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)),
    )


class _Likelihood(PolicyObjective):
    """−log π of the given token, times the advantage; every advantage is the weight of the cross-entropy."""

    def __init__(self, *, weight: float, aggregation: Literal["token", "sequence"]) -> None:
        self.weight = weight
        self.aggregation = aggregation

    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None) -> Tensor:
        return torch.full(rollouts.tokens.shape, self.weight, device=rollouts.tokens.device)

    def loss(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Tensor:
        return -advantages * student.logprobs

    def diagnostics(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Mapping[str, Tensor]:
        return {"cross_entropy": -student.logprobs}


class SupervisedStep:
    """Learns from given completions, in torch alone.

        loss = sft_weight · Σ c · (−log π_θ(y_t))  +  β(step) · Σ c · D_t(π_θ, π_T)

    c is 1 / (tokens of the update) or, with `aggregation: sequence`, 1 / (rollouts · tokens of the rollout), over all
    micro-batches and ranks; the end token counts, the prompt does not. Both in nats/token.

    Args:
        student: its tokenizer, vocabulary limit, end tokens and device.
        settings: `tokens_per_micro_batch`, `batching`, `max_grad_norm` and `distil_temperature` are used.
        teacher: scores the given tokens; set up by the caller.
        divergence: of whole distributions or top-k tokens.
        beta: coefficient of the divergence.
        sft_weight: coefficient of the cross-entropy.
        aggregation: of both terms.

    Raises:
        ConfigError: see `distillkit.refusals.check_supervised`.
    """

    def __init__(
        self,
        *,
        student: StudentInfo,
        settings: StepSettings,
        teacher: TeacherScorer | None = None,
        divergence: DivergenceEstimator | None = None,
        beta: BetaScheduler | None = None,
        sft_weight: float = 1.0,
        aggregation: Literal["token", "sequence"] = "token",
    ) -> None:
        check_supervised(teacher=teacher, divergence=divergence, beta=beta, sft_weight=sft_weight)
        self.student = student
        self.settings = settings
        self.teacher, self.divergence, self.beta = teacher, divergence, beta
        self.objective = _Likelihood(weight=sft_weight, aggregation=aggregation)
        self.signals: dict[str, float] = {}

    def run(self, rollouts: RolloutBatch, *, step: int, backend: StepBackend) -> StepOutput:
        """Take one optimizer step on this rank's share of the completions.

        Args:
            rollouts: from `given_rollouts`.
            step: from 0.
            backend: optimizer and ranks.
        """
        context = self._context(step, rollouts.settings)
        device = self.student.device
        clock, meters = PhaseClock(device), Meters()
        with clock.phase("step"):
            batch = self._prepare(rollouts, context, clock)
            with clock.phase("update"):
                result = update(batch, self.settings, device, backend, meters)
        clock.tokens("update", result.tokens)
        clock.tokens("step", int(rollouts.completion_lengths.sum()))
        everything = torch.ones(len(rollouts), dtype=torch.bool, device=device)
        meters.add("train/completion_length", rollouts.completion_lengths, everything)
        metrics = {**meters.reduce(backend, device), **clock.metrics(), **context.metrics()}
        self.signals = {k: v for k, v in metrics.items() if not k.startswith(("time/", "tokens_per_second/"))}
        return StepOutput(
            rollouts=rollouts,
            rewards=None,
            metrics=metrics,
            per_token={name: grid for name, grid in result.per_token.items() if name in _PER_TOKEN},
            updates=result.updates,
            skipped=result.skipped,
        )

    def _context(self, step: int, sampling: SamplingSettings) -> StepContext:
        return StepContext(
            step=step,
            sampling=sampling,
            objective=self.objective,
            divergence=self.divergence,
            masker=None,
            reference_divergence=None,
            beta=0.0 if self.beta is None else self.beta.value(step, self.signals),
            reference_beta=0.0,
            policy_weight=1.0,
            distil_temperature=self.settings.distil_temperature,
        )

    def _prepare(self, rollouts: RolloutBatch, context: StepContext, clock: PhaseClock) -> PreparedBatch:
        divergence = self.divergence if context.beta != 0 else None
        teacher = None
        if divergence is not None and self.teacher is not None:
            request = replace(divergence.needs, temperature=context.distil_temperature)
            if not request.needs_distribution:
                request = replace(request, sampled=True)  # costs nothing beside a top-k, and the rollout file shows it
            with clock.phase("teacher"):
                teacher = self.teacher.score(rollouts, request)
            clock.tokens("teacher", int(rollouts.lengths.sum()))
        ones = torch.ones(rollouts.tokens.shape, device=rollouts.tokens.device)
        return PreparedBatch(
            rollouts=rollouts,
            rewards=None,
            teacher=teacher,
            reference=None,
            weights=TokenWeights(policy=ones, distil=ones),
            context=context,
            plan=ScorePlan(
                sampling_temperature=1.0, distil_temperature=context.distil_temperature, divergence=divergence
            ),
            same_engine=False,
            advantages=self.objective.advantages(rollouts, None, teacher),
            scored=torch.ones(len(rollouts), dtype=torch.bool, device=rollouts.tokens.device),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the last metrics and the state of the schedule."""
        return {"signals": dict(self.signals), "beta": {} if self.beta is None else self.beta.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.signals = dict(state["signals"])
        if self.beta is not None:
            self.beta.load_state_dict(state["beta"])
