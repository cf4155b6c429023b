"""How far the engine that sampled is from the trainer that learns, on the tokens of the rollouts."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillkit.backends import StepBackend
from distillkit.components import StudentInfo
from distillkit.errors import RolloutError, TrainingStopped, problem
from distillkit.scorer import ScorePlan
from distillkit.types import RolloutBatch, RolloutGroup, SampleRequest

if TYPE_CHECKING:
    from distillkit.meters import Meters

__all__ = ["EngineGap", "EngineProbe"]

_PROBE_ROLLOUTS, _PROBE_TOKENS = 4, 16


class EngineGap:
    """Mean |log π_old − log μ| in nats/token: π_old is the trainer before its update, μ what the engine drew from.

    Two engines with the same weights differ by rounding (1e-6 in float32, some 1e-2 in bfloat16). Stale weights, an
    adapter that was not delivered or another temperature show as a larger gap, and nothing else shows them: the run
    goes on and learns from another policy's tokens.

    Args:
        rollouts: with the engine's log-probs; tokens of which they are unknown (NaN) do not count.
        limit: nats/token above which the run stops; None only measures.
        metric: what it is recorded as.
    """

    def __init__(self, rollouts: RolloutBatch, limit: float | None, metric: str = "train/engine_gap") -> None:
        self._rollouts = rollouts
        self._limit = limit
        self._metric = metric
        self._sums = torch.zeros(2, dtype=torch.float64, device=rollouts.tokens.device)

    def add(self, index: Tensor, old_logprobs: Tensor) -> None:
        """Count the sampled tokens of rollouts `index` [n]; `old_logprobs` [n, L] at the sampling temperature."""
        length = old_logprobs.shape[1]
        behaviour = self._rollouts.behaviour_logprobs[index, :length]
        known = self._rollouts.loss_mask[index, :length] & ~behaviour.isnan()
        gaps = (old_logprobs.detach() - behaviour)[known].abs().double()
        self._sums += torch.stack([gaps.sum(), known.sum().double()])

    def check(self, step: int, backend: StepBackend, meters: Meters) -> None:
        """Record the gap, and stop every rank when the mean over all of them is above the limit.

        Raises:
            TrainingStopped: before the update, so that checkpoints hold nothing learned from these rollouts.
        """
        meters.add_sum(self._metric, *self._sums.tolist())
        total, count = backend.all_reduce(self._sums, "sum").tolist()
        if self._limit is not None and count and not total / count <= self._limit:
            where = f"step {step + 1}: the engine that sampled and the trainer disagree about the sampled tokens"
            expected = f"at most {self._limit:g} (model.sampler.max_engine_gap)"
            hint = "stale weights or another temperature in the engine? distillkit never uses these rollouts"
            got = f"{total / count:.4g} nats/token on average, over {count:.0f} tokens"
            raise TrainingStopped(problem(where, got=got, expected=expected, hint=hint))


class EngineProbe:
    """A few short completions drawn beside rollouts for the next step, while the trainer still has their weights.

    Rollouts of older weights differ from the trainer by the update in between: their gap says little of the engine. The
    probe's tokens are compared before that update, so that a broken sync is found at the step that it belongs to.

    Args:
        like: a request of the rollouts beside it, for prompt and temperature.
    """

    GROUP = -1
    """Its group id; those of rollouts are their place in the stream of prompts."""

    def __init__(self, like: SampleRequest) -> None:
        settings, seed = like.settings, like.seed ^ 1 << 40
        count, tokens = min(_PROBE_ROLLOUTS, settings.group_size), min(_PROBE_TOKENS, settings.max_new_tokens)
        short = replace(settings, group_size=count, max_new_tokens=tokens)
        self.request = replace(like, group_id=self.GROUP, seed=seed, settings=short)
        self._answer: Future[RolloutGroup] = Future()

    def answer(self, group: RolloutGroup) -> None:
        """Take the completions."""
        self._answer.set_result(group)

    def ended(self, sampling: Future[dict[int, RolloutGroup]]) -> None:
        """Hear that the sampling is over."""
        if not self._answer.done():
            error = None if sampling.cancelled() else sampling.exception()
            missing = RolloutError(problem("model.sampler: a group is missing", got="no completions of the probe"))
            self._answer.set_exception(error or missing)

    def check(self, step: int, limit: float | None, student: StudentInfo, backend: StepBackend, meters: Meters) -> None:
        """Wait for the completions, record `train/engine_gap` and stop every rank above `limit` nats/token.

        Raises:
            TrainingStopped: see `EngineGap.check`.
            Exception: what the sampler raised.
        """
        batch = RolloutBatch.from_groups([self._answer.result()], student.pad_token_id).to(student.device)
        plan = ScorePlan(sampling_temperature=self.request.settings.temperature, distil_temperature=1.0)
        with torch.no_grad():
            scores = backend.score(batch, plan, None, None)
        gap = EngineGap(batch, limit)
        gap.add(torch.arange(len(batch), device=student.device), scores.logprobs)
        gap.check(step, backend, meters)
