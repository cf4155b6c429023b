"""Trust-region ratio distillation, the objective of RLAD: `trrd`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

import torch
from torch import Tensor

from distillkit.components import Aggregation
from distillkit.functional.objectives import ClampGradient, trrd_log_ratio
from distillkit.objectives._inputs import sampled_scores
from distillkit.objectives.grpo import GRPO
from distillkit.types import ScoreRequest, StudentScores, TeacherScores

__all__ = ["TRRD"]


class TRRD(GRPO):
    """GRPO with r = (π_θ/π_old)^α · (π_θ/π_T)^(1−α): old policy and teacher together bound how far a token may move.

    log r = α·(log π_θ − log π_old) + (1−α)·clamp(log π_θ − log π_T, ±clamp); α = 1 is GRPO, bit for bit. Where the
    teacher could not score a token, the ratio is GRPO's there. Groups whose rewards are all equal learn nothing, from
    the teacher neither. On the first update already r ≠ 1, so the clip is active from the start.

    See *Reinforcement-aware Knowledge Distillation for LLM Reasoning*, Zhang et al., 2026,
    https://arxiv.org/abs/2602.22495 (eq. 3 and 4, appendix B).

    What no source settles, and the default here:

    * the direction of α: the paper's text and its eq. 3 disagree; the equation counts, α belongs to the old policy;
    * whether gradient passes the clamp: `clamp_grad`, a plain (differentiable) clamp; `teacher_clamped` is logged;
    * the token normalisation of their code: `aggregation`, as eq. 4 is written (mean per rollout, then over rollouts);
    * the std: eq. 4 shows the population's, without an epsilon;
    * the clip range of their math runs: that of their logic runs, 0.2 and 0.28;
    * the extra KL to a reference (its β, estimator and model): off; `model.reference` adds one.

    Args:
        alpha: exponent of the old policy, from 0 (the teacher alone) to 1 (GRPO).
        clamp: bound on log π_θ − log π_T, in nats; null for none.
        clamp_grad: `differentiable` no gradient from the teacher's factor where the clamp binds, `through` gradient as
            if unclamped, `detached` none from the teacher's factor at all.
        std: divide by the group's standard deviation.
        correction: 1 the sample standard deviation, 0 the population's.
        eps: added to the standard deviation.
        aggregation: `token`, `sequence` or `constant`, as in GRPO.
        constant_length: divisor of `constant`, in tokens; null is the sampler's `max_new_tokens`.
        clip_low: how far below 1 the ratio may count.
        clip_high: how far above 1.
        dual_clip: cap of the loss at dual_clip·|Â| where Â < 0; above 1, null for none.

    Raises:
        ConfigError: an argument out of its range, at the start or, where `model.schedules` moves it, at that step.
    """

    needs = ScoreRequest(sampled=True)

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        clamp: float | None = 1.0,
        clamp_grad: ClampGradient = "differentiable",
        std: bool = True,
        correction: int = 0,
        eps: float = 0.0,
        aggregation: Aggregation = "sequence",
        constant_length: int | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        dual_clip: float | None = None,
    ) -> None:
        self.alpha = alpha
        self.clamp = clamp
        self.clamp_grad = clamp_grad
        super().__init__(
            std=std,
            correction=correction,
            eps=eps,
            aggregation=aggregation,
            constant_length=constant_length,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )

    def _limits(self) -> Iterator[tuple[str, bool, str]]:
        yield "alpha", 0 <= self.alpha <= 1, "between 0 (the teacher alone) and 1 (GRPO)"
        yield "clamp", self.clamp is None or self.clamp > 0, "above 0 nats, or null for none"
        modes = get_args(ClampGradient)
        yield "clamp_grad", self.clamp_grad in modes, "differentiable, through or detached"
        yield from super()._limits()

    def log_ratio(self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None) -> Tensor:
        """Return log r [n, L]; GRPO's where the teacher has no score."""
        plain = super().log_ratio(student, old_logprobs, scores)
        valid, teacher = sampled_scores("TRRD", scores)
        mixed = trrd_log_ratio(
            student.logprobs,
            old_logprobs.detach(),
            teacher,
            self.alpha,
            self.clamp,
            self.clamp_grad,
            distil_logprobs=student.distil_logprobs,
        )
        return torch.where(valid, mixed, plain)

    @torch.no_grad()
    def diagnostics(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Mapping[str, Tensor]:
        """Return GRPO's diagnostics, and `teacher_clamped`: 1 where the clamp on the teacher's log-ratio binds."""
        valid, teacher = sampled_scores("TRRD", scores)
        found = dict(super().diagnostics(student, old_logprobs, scores, advantages))
        bound = float("inf") if self.clamp is None else self.clamp
        found["teacher_clamped"] = (valid & ((student.distil_logprobs - teacher).abs() > bound)).float()
        return found
