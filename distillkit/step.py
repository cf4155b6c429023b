"""One rollout batch to gradients, in torch alone.

    prompts ─sampler→ rollouts ─┬─rewards→ RewardOutput ──────────┐
                                ├─teacher, reference→ scores ─────┼─objective.advantages→ advantages [N, L] ─┐
                                └─masker(rollouts, rewards, scores)→ token weights [N, L] ────────────┐      │
    student forward (micro-batches, head in chunks) → student scores → divergence [N, L] ─────────────┤      │
          loss = Σ c_policy · objective.loss  +  β(step) · Σ c_distil · divergence  ←─────────────────┴──────┘
          (c: detached coefficients = weight × mask ÷ global count)

`DistillationStep.run` is that sentence; `distillkit.update` turns a prepared batch into optimizer steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillkit.ahead import RolloutsAhead, sampled
from distillkit.backends import StepBackend
from distillkit.clock import PhaseClock
from distillkit.components import StudentInfo
from distillkit.early import EarlyScores
from distillkit.engine_gap import EngineProbe
from distillkit.errors import ContractError, RolloutError, problem
from distillkit.meters import Meters, reward_meters, rollout_meters, staleness_meter
from distillkit.prepared import PreparedBatch, StepContext, StepSettings
from distillkit.refusals import SCHEDULED_SCALARS, StepParts, check_parts, teacher_request
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.types import (
    RewardOutput,
    RolloutBatch,
    RolloutGroup,
    SampleRequest,
    ScoreRequest,
    StepOutput,
    TeacherScores,
    TokenWeights,
)
from distillkit.update import old_policy_scores, update

__all__ = ["DistillationStep"]


class DistillationStep:
    """Runs rollout steps over swappable parts.

    Args:
        parts: what fills the seven slots; combinations that cannot work are refused here.
        settings: the step's own numbers.
        scorer: the student.
        student: its tokenizer, vocabulary limit and end tokens.

    Raises:
        ConfigError: see `distillkit.refusals`.
    """

    def __init__(self, parts: StepParts, settings: StepSettings, scorer: StudentScorer, student: StudentInfo) -> None:
        check_parts(parts, settings.distill_through, settings.distil_temperature, one_step_off=settings.one_step_off)
        self.parts = parts
        self.settings = settings
        self.scorer = scorer
        self.student = student
        self.signals: dict[str, float] = {}
        self.ahead = RolloutsAhead()
        scorers = {key: getattr(parts, key) for key in ("teacher", "reference")}
        self._early = {
            k: EarlyScores(part, student) for k, part in scorers.items() if part is not None and part.elsewhere
        }

    def run(
        self,
        requests: Sequence[SampleRequest],
        *,
        step: int,
        backend: StepBackend,
        following: Sequence[SampleRequest] = (),
    ) -> StepOutput:
        """Sample, score, and learn from one batch of prompts.

        Args:
            requests: this rank's prompts, with whole groups.
            step: rollout step, from 0.
            backend: optimizer and ranks.
            following: the next step's prompts, to be sampled while this step learns (its weights are then one step
                old); none with `one_step_off` false.
        """
        context = self.context(step)
        clock, meters = PhaseClock(self.student.device), Meters()
        with clock.phase("step"):
            rollouts = self.rollout(requests, context, backend, clock, following)
            rewards, teacher, reference = self.judge(rollouts, context, clock)
            batch = self.prepare(rollouts, rewards, teacher, reference, context, backend, clock)
            if self.ahead.probe is not None:
                probe, self.ahead.probe = self.ahead.probe, None
                probe.check(step, self.parts.sampler.max_engine_gap, self.student, backend, meters)
            with clock.phase("update"):
                result = update(batch, self.settings, self.student.device, backend, meters)
        sampled = int(rollouts.completion_lengths.sum())
        clock.tokens("update", result.tokens)
        clock.tokens("step", sampled)
        rollout_meters(meters, rollouts)
        if self.settings.one_step_off:
            staleness_meter(meters, rollouts, step)
        if rewards is not None:
            reward_meters(meters, rewards)
        metrics = {**meters.reduce(backend, self.student.device), **clock.metrics(), **context.metrics()}
        self.signals = {k: v for k, v in metrics.items() if not k.startswith(("time/", "tokens_per_second/"))}
        return StepOutput(
            rollouts=rollouts,
            rewards=rewards,
            metrics=metrics,
            per_token=result.per_token,
            updates=result.updates,
            skipped=result.skipped,
        )

    def context(self, step: int) -> StepContext:
        """Return the parts and scalars of rollout step `step`, schedules applied; no part is changed."""
        parts = self.parts
        scheduled = {path: schedule.value(step, self.signals) for path, schedule in parts.schedules.items()}

        def at(key: str) -> Any:
            part = getattr(parts, key)
            prefix = f"{key}."
            values = {p.removeprefix(prefix): v for p, v in scheduled.items() if p.startswith(prefix)}
            return part if part is None else part.at(values)

        scalars = {name: scheduled.get(name, getattr(self.settings, name)) for name in SCHEDULED_SCALARS}
        return StepContext(
            step=step,
            sampling=at("sampler").settings,
            objective=at("objective"),
            divergence=at("divergence"),
            masker=at("masker"),
            reference_divergence=parts.reference_divergence,
            beta=0.0 if parts.beta is None else parts.beta.value(step, self.signals),
            reference_beta=0.0 if parts.reference_beta is None else parts.reference_beta.value(step, self.signals),
            policy_weight=scalars["policy_weight"],
            distil_temperature=scalars["distil_temperature"],
            scheduled=scheduled,
        )

    def _upcoming(self, step: int) -> StepContext:
        """The context of a step to come, as far as it is known: no schedule moves on."""
        states = {key: copy.deepcopy(schedule.state_dict()) for key, schedule in self._schedules().items()}
        context = self.context(step)
        for key, schedule in self._schedules().items():
            schedule.load_state_dict(states[key])
        return context

    def rollout(
        self,
        requests: Sequence[SampleRequest],
        context: StepContext,
        backend: StepBackend,
        clock: PhaseClock,
        following: Sequence[SampleRequest] = (),
    ) -> RolloutBatch:
        """Sample every request with the student's current weights; groups come back in the order of the requests."""
        wanted = [replace(request, settings=context.sampling) for request in requests]
        sampler, asking = self.parts.sampler, self._asking(context)
        with clock.phase("rollout"):
            groups = self.ahead.take(wanted)
        with ExitStack() as gathered:
            with clock.phase("sync"):
                sampler.sync(gathered.enter_context(backend.whole()))
                if not sampler.same_engine:
                    gathered.close()
            if groups is None:
                with clock.phase("rollout"):
                    groups = sampled(sampler, wanted, asking)
        if following:
            upcoming = self._upcoming(context.step + 1)
            settings = [replace(request, settings=upcoming.sampling) for request in following]
            self.ahead.start(sampler, settings, self._asking(upcoming), EngineProbe(settings[0]))
        missing = [request.group_id for request in wanted if request.group_id not in groups]
        if missing:
            where = f"{type(sampler).__name__}.sample: groups are missing"
            raise RolloutError(problem(where, got=f"no group {missing[:5]}"))
        ordered = [groups[request.group_id] for request in wanted]
        rollouts = RolloutBatch.from_groups(ordered, self.student.pad_token_id).to(self.student.device)
        clock.tokens("rollout", int(rollouts.completion_lengths.sum()))
        return rollouts

    def judge(
        self, rollouts: RolloutBatch, context: StepContext, clock: PhaseClock
    ) -> tuple[RewardOutput | None, TeacherScores | None, TeacherScores | None]:
        """Reward the rollouts beside (in time) scoring them with teacher and reference."""
        wanted = self._score_requests(context)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards") as pool:
            pending = pool.submit(self._reward, rollouts, clock)
            teacher, reference = (
                self._score(key, rollouts, wanted[key], clock) if key in wanted else None
                for key in ("teacher", "reference")
            )
            return pending.result(), teacher, reference

    def _score_requests(self, context: StepContext) -> dict[str, ScoreRequest]:
        """What is asked of teacher and reference; a key is missing where nothing is."""
        requests = {"teacher": teacher_request(self.parts)}
        if context.reference_divergence is not None and self.parts.reference is not None:
            requests["reference"] = context.reference_divergence.needs
        if requests["teacher"] and not requests["teacher"].needs_distribution:
            # costs nothing beside a top-k, and the rollout file shows it
            requests["teacher"] = replace(requests["teacher"], sampled=True)
        return {k: replace(r, temperature=context.distil_temperature) for k, r in requests.items() if r}

    def _asking(self, context: StepContext) -> Callable[[RolloutGroup], None]:
        """Return what to do with a finished group: have it scored where others compute."""
        requests = self._score_requests(context)
        early = {key: scores for key, scores in self._early.items() if key in requests}

        def ask(group: RolloutGroup) -> None:
            for key, scores in early.items():
                scores.ask(group, requests[key])

        return ask

    def prepare(
        self,
        rollouts: RolloutBatch,
        rewards: RewardOutput | None,
        teacher: TeacherScores | None,
        reference: TeacherScores | None,
        context: StepContext,
        backend: StepBackend,
        clock: PhaseClock,
    ) -> PreparedBatch:
        """Decide advantages and token weights, with a pass of the old policy where one is needed."""
        ones = torch.ones(rollouts.tokens.shape, device=rollouts.tokens.device)
        weights = TokenWeights(policy=ones, distil=ones)
        if context.masker is not None:
            weights = context.masker(rollouts, rewards, teacher)
        plan = ScorePlan(
            sampling_temperature=context.sampling.temperature,
            distil_temperature=context.distil_temperature,
            divergence=None if context.beta == 0 else context.divergence,
            reference_divergence=None if context.reference_beta == 0 else context.reference_divergence,
        )
        frozen = self.settings.distill_through != "loss" and plan.divergence is not None
        several = self.settings.inner_epochs * self.settings.minibatches > 1
        batch = PreparedBatch(
            rollouts=rollouts, rewards=rewards, teacher=teacher, reference=reference, weights=weights, context=context,
            plan=plan, same_engine=self.parts.sampler.same_engine, stale=self.ahead.stale,
            max_engine_gap=None if self.ahead.stale else self.parts.sampler.max_engine_gap,
        )  # fmt: skip
        if several or (frozen and self.settings.distill_through == "reward"):
            with clock.phase("old_policy"):
                old = old_policy_scores(batch, self.settings, self.student.device, backend)
            divergence = old.divergence if frozen else None
            batch = replace(batch, old_logprobs=old.logprobs, frozen_divergence=divergence)
        rewards = self._shaped(batch)
        if context.objective is None or rewards is None:
            scored = torch.zeros(len(rollouts), dtype=torch.bool, device=rollouts.tokens.device)
            return replace(batch, advantages=torch.zeros_like(ones), scored=scored)
        return replace(batch, advantages=self._advantages(batch, rewards), scored=~rewards.total.isnan())

    def _shaped(self, batch: PreparedBatch) -> RewardOutput | None:
        """The rewards, with the divergence among them under `distill_through: reward`."""
        if self.settings.distill_through != "reward" or batch.frozen_divergence is None:
            return batch.rewards
        shaped = self._divergence_reward(batch, batch.frozen_divergence).to(self.student.device)
        return shaped if batch.rewards is None else RewardOutput.merge([batch.rewards, shaped])

    def _advantages(self, batch: PreparedBatch, rewards: RewardOutput) -> Tensor:
        objective = batch.context.objective
        assert objective is not None
        advantages = objective.advantages(batch.rollouts, rewards, batch.teacher)
        if advantages.shape != batch.rollouts.tokens.shape or advantages.requires_grad:
            got = f"{tuple(advantages.shape)}, requires_grad {advantages.requires_grad}"
            expected = f"{tuple(batch.rollouts.tokens.shape)}, detached"
            raise ContractError(problem(f"{type(objective).__name__}.advantages", got=got, expected=expected))
        return batch.context.policy_weight * advantages

    def _divergence_reward(self, batch: PreparedBatch, divergence: Tensor) -> RewardOutput:
        mask = batch.rollouts.loss_mask
        weighted = (divergence * batch.weights.distil).masked_fill(~mask, 0.0).sum(dim=1)
        if self.settings.reward_shaping == "mean":
            weighted = weighted / mask.sum(dim=1).clamp(min=1)
        return RewardOutput.single("distillation", (-weighted).tolist(), weight=batch.context.beta)

    def _reward(self, rollouts: RolloutBatch, clock: PhaseClock) -> RewardOutput | None:
        if not self.parts.rewards:
            return None
        with clock.phase("reward"):
            return RewardOutput.merge([reward(rollouts) for reward in self.parts.rewards]).to(self.student.device)

    def _score(self, key: str, rollouts: RolloutBatch, request: ScoreRequest, clock: PhaseClock) -> TeacherScores:
        with clock.phase(key):
            early = self._early[key].collect(rollouts, request) if key in self._early else None
            scores: TeacherScores = early or getattr(self.parts, key).score(rollouts, request)
        clock.tokens(key, int(rollouts.lengths.sum()))
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the last metrics and the state of every schedule."""
        return {
            "signals": dict(self.signals),
            "schedules": {key: schedule.state_dict() for key, schedule in self._schedules().items()},
            "ahead": self.ahead.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.signals = dict(state["signals"])
        self.ahead.load_state_dict(state.get("ahead", {}))
        for key, schedule in self._schedules().items():
            schedule.load_state_dict(state["schedules"].get(key, {}))

    def close(self) -> None:
        """Stop what runs beside the step."""
        self.ahead.close()
        for scores in self._early.values():
            scores.close()

    def _schedules(self) -> dict[str, Any]:
        own = {"beta": self.parts.beta, "reference_beta": self.parts.reference_beta}
        return {key: s for key, s in {**own, **self.parts.schedules}.items() if s is not None}
