"""How far the engine that sampled is from the trainer that learns, on the tokens of the rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillkit.backends import StepBackend
from distillkit.errors import TrainingStopped, problem

if TYPE_CHECKING:
    from distillkit.meters import Meters
    from distillkit.types import RolloutBatch

__all__ = ["EngineGap"]


class EngineGap:
    """Mean |log π_old − log μ| in nats/token: π_old is the trainer before its update, μ what the engine drew from.

    Two engines with the same weights differ by rounding (1e-6 in float32, some 1e-2 in bfloat16). Stale weights, an
    adapter that was not delivered or another temperature show as a larger gap, and nothing else shows them: the run
    goes on and learns from another policy's tokens.

    Args:
        rollouts: with the engine's log-probs; tokens of which they are unknown (NaN) do not count.
        limit: nats/token above which the run stops; None only measures.
    """

    def __init__(self, rollouts: RolloutBatch, limit: float | None) -> None:
        self._rollouts = rollouts
        self._limit = limit
        self._sums = torch.zeros(2, dtype=torch.float64, device=rollouts.tokens.device)

    def add(self, index: Tensor, old_logprobs: Tensor) -> None:
        """Count the sampled tokens of rollouts `index` [n]; `old_logprobs` [n, L] at the sampling temperature."""
        length = old_logprobs.shape[1]
        behaviour = self._rollouts.behaviour_logprobs[index, :length]
        known = self._rollouts.loss_mask[index, :length] & ~behaviour.isnan()
        gaps = (old_logprobs.detach() - behaviour)[known].abs().double()
        self._sums += torch.stack([gaps.sum(), known.sum().double()])

    def check(self, step: int, backend: StepBackend, meters: Meters) -> None:
        """Record `train/engine_gap`, and stop every rank when the mean over all of them is above the limit.

        Raises:
            TrainingStopped: before the update, so that checkpoints hold nothing learned from these rollouts.
        """
        meters.add_sum("train/engine_gap", *self._sums.tolist())
        total, count = backend.all_reduce(self._sums, "sum").tolist()
        if self._limit is not None and count and not total / count <= self._limit:
            where = f"step {step + 1}: the engine that sampled and the trainer disagree about the sampled tokens"
            expected = f"at most {self._limit:g} (model.sampler.max_engine_gap)"
            hint = "stale weights or another temperature in the engine? distillkit never uses these rollouts"
            got = f"{total / count:.4g} nats/token on average, over {count:.0f} tokens"
            raise TrainingStopped(problem(where, got=got, expected=expected, hint=hint))
