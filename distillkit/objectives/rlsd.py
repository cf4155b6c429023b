"""The teacher as a token-wise factor of the advantage: `rlsd`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from distillkit.components import Aggregation
from distillkit.functional.objectives import teacher_evidence
from distillkit.objectives._inputs import sampled_scores
from distillkit.objectives.grpo import GRPO
from distillkit.types import ScoreRequest, StudentScores, TeacherScores

__all__ = ["RLSD"]


class RLSD(GRPO):
    """GRPO with Â·((1−λ) + λ·clip(e^(sign(Â)·d), 1−ε, 1+ε)), d = log π_T − log π_old at the sampled token, detached.

    The reward decides the direction and the teacher how much of it each token gets: in a good rollout the tokens that
    the teacher likes better than the student does, in a bad one those that it likes less. The factor is positive (ε <
    1), so the teacher never turns a sign; groups with equal rewards learn nothing. Where the teacher could not score a
    token the factor is 1. d is fixed when the tokens are sampled, as an advantage is. Â is the advantage that the loss
    is given, a divergence's share under `distill_through: advantage` included.

    See arXiv 2609.04108, 2026, https://arxiv.org/abs/2609.04108 (RLSD; the formula is read second-hand, with the
    current student in d, the same thing on-policy). Neither λ nor ε is known; the defaults are this package's.

    π_old is known at the sampling temperature alone: keep `model.distil_temperature`, the teacher's, equal to it.

    Args:
        mix: λ, share of the teacher's factor, from 0 (GRPO) to 1.
        bound: ε, how far from 1 the teacher's factor may go, above 0 and below 1.
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
        mix: float = 0.5,
        bound: float = 0.2,
        std: bool = True,
        correction: int = 1,
        eps: float = 1e-6,
        aggregation: Aggregation = "token",
        constant_length: int | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
    ) -> None:
        self.mix = mix
        self.bound = bound
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
        yield "mix", 0 <= self.mix <= 1, "between 0 (GRPO) and 1 (the teacher's factor alone)"
        yield "bound", 0 < self.bound < 1, "above 0 and below 1: at 1 the factor could take a token's gradient away"
        yield from super()._limits()

    def _evidence(self, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor) -> Tensor:
        valid, teacher = sampled_scores("RLSD", scores)
        old = old_logprobs.detach()
        return teacher_evidence(torch.where(valid, teacher, old), old, advantages)

    def _factor(self, evidence: Tensor) -> Tensor:
        return (1 - self.mix) + self.mix * evidence.clamp(1 - self.bound, 1 + self.bound)

    def loss(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Tensor:
        """Return GRPO's loss [n, L] of the weighted advantages."""
        self._check("model.schedules.objective")
        factor = self._factor(self._evidence(old_logprobs, scores, advantages))
        return super().loss(student, old_logprobs, scores, advantages * factor)

    @torch.no_grad()
    def diagnostics(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Mapping[str, Tensor]:
        """Return GRPO's, `teacher_factor` (on Â), and `teacher_clamped`: 1 where its bound binds."""
        evidence = self._evidence(old_logprobs, scores, advantages)
        return {
            **super().diagnostics(student, old_logprobs, scores, advantages),
            "teacher_factor": self._factor(evidence),
            "teacher_clamped": ((evidence - 1).abs() > self.bound).float(),
        }
