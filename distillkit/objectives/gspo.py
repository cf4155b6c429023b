"""Group sequence policy optimization: `gspo`."""

from __future__ import annotations

from torch import Tensor

from distillkit.components import Aggregation
from distillkit.functional.objectives import sequence_log_ratio
from distillkit.objectives.grpo import GRPO
from distillkit.types import StudentScores, TeacherScores

__all__ = ["GSPO"]


class GSPO(GRPO):
    """GRPO with one ratio per rollout, s = (π_θ(y)/π_old(y))^(1/|y|), clipped as a whole.

    |y| counts the `loss_mask` tokens. Written as GSPO-token: every token has the value s and the gradient s·∇log
    π_θ(y_t), so tokens may have advantages of their own. Where the tokens of a rollout share one, the mean over the
    rollout has exactly the gradient of −s·Â.

    s is a geometric mean and stays close to 1, so the clip is three orders of magnitude tighter than GRPO's, and the
    share of clipped tokens is large in a healthy run.

    See *Group Sequence Policy Optimization*, Zheng et al., 2025, https://arxiv.org/abs/2507.18071 (clip 3e-4 and 4e-4,
    four minibatches per batch of rollouts: `model.minibatches: 4`).

    Args:
        std: divide by the group's standard deviation.
        correction: 1 the sample standard deviation, 0 the population's.
        eps: added to the standard deviation.
        aggregation: `sequence` (as published), `token` or `constant`, as in GRPO.
        constant_length: divisor of `constant`, in tokens; null is the sampler's `max_new_tokens`.
        clip_low: how far below 1 the rollout's ratio may count.
        clip_high: how far above 1.

    Raises:
        ConfigError: an argument out of its range, at the start or, where `model.schedules` moves it, at that step.
    """

    def __init__(
        self,
        *,
        std: bool = True,
        correction: int = 1,
        eps: float = 1e-6,
        aggregation: Aggregation = "sequence",
        constant_length: int | None = None,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
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

    def log_ratio(self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None) -> Tensor:
        """Return log s [n, L], the same number on every token of a rollout, 0 off `loss_mask`."""
        return sequence_log_ratio(student.logprobs, old_logprobs.detach(), student.loss_mask)
