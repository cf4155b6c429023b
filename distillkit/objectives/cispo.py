"""Clipped importance-sampling weights: `cispo`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.components import Aggregation
from distillkit.functional.objectives import clipped_weight_loss
from distillkit.objectives.grpo import GRPO
from distillkit.types import StudentScores, TeacherScores

__all__ = ["CISPO"]


class CISPO(GRPO):
    """−sg[clip(r, 1−clip_low, 1+clip_high)]·Â·log π_θ, r = π_θ/π_old: the clip bounds a token's weight.

    PPO's clip takes the gradient of a token away; rare tokens at which a line of reasoning forks are the first to lose
    it. Here no token does.

    See *MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention*, MiniMax, 2025,
    https://arxiv.org/abs/2506.13585 (eq. 4 and 5; token mean; no lower bound on the weight). The paper tunes the upper
    bound and does not print it; the default caps the weight at 5, in the range that *The Art of Scaling Reinforcement
    Learning Compute for LLMs*, Khatri et al., 2025, https://arxiv.org/abs/2510.13786, found not to matter.

    Args:
        std: divide by the group's standard deviation.
        correction: 1 the sample standard deviation, 0 the population's.
        eps: added to the standard deviation.
        aggregation: `token` (as published), `sequence` or `constant`, as in GRPO.
        constant_length: divisor of `constant`, in tokens; null is the sampler's `max_new_tokens`.
        clip_low: how far below 1 the weight may fall; 1 is no bound.
        clip_high: how far above 1 it may rise.

    Raises:
        ConfigError: an argument out of its range, at the start or, where `model.schedules` moves it, at that step.
    """

    def __init__(
        self,
        *,
        std: bool = True,
        correction: int = 1,
        eps: float = 1e-6,
        aggregation: Aggregation = "token",
        constant_length: int | None = None,
        clip_low: float = 1.0,
        clip_high: float = 4.0,
    ) -> None:
        super().__init__(
            std=std,
            correction=correction,
            eps=eps,
            aggregation=aggregation,
            constant_length=constant_length,
            clip_low=clip_low,
            clip_high=clip_high,
        )

    def loss(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Tensor:
        """Return the weighted log-likelihood loss [n, L]."""
        self._check("model.schedules.objective")
        log_ratio = self.log_ratio(student, old_logprobs, scores)
        return clipped_weight_loss(log_ratio, student.logprobs, advantages, self.clip_low, self.clip_high)

    @torch.no_grad()
    def diagnostics(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Mapping[str, Tensor]:
        """Return GRPO's, where `clipped_high` and `clipped_low` are 1 on tokens whose *weight* a bound holds.

        Whatever the sign of their advantage; they keep their gradient.
        """
        found = dict(super().diagnostics(student, old_logprobs, scores, advantages))
        counts = advantages != 0
        found["clipped_high"] = (counts & (found["ratio"] > 1 + self.clip_high)).float()
        found["clipped_low"] = (counts & (found["ratio"] < 1 - self.clip_low)).float()
        return found
