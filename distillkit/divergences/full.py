"""Divergences of whole distributions: `forward_kl`, `reverse_kl`, `jsd`.

Exact at every prefix, so the gradient has no sampling noise; the teacher must be able to give any token's probability.
The logits arrive in chunks of token positions; no `[N, L, V]` tensor exists.
"""

from __future__ import annotations

from torch import Tensor

from distillkit.components import DivergenceEstimator
from distillkit.divergences._inputs import pair
from distillkit.errors import ConfigError, problem
from distillkit.functional import divergences as functional
from distillkit.types import ScoreRequest, TokenScores

__all__ = ["JSD", "ForwardKL", "FullDivergence", "ReverseKL"]


class FullDivergence(DivergenceEstimator):
    """What divergences of whole distributions share: the request, and why they are no advantage."""

    allowed_through = ("loss", "reward")
    why_not = (
        "it does not depend on the sampled token, so its expected gradient as an advantage is zero: "
        "set model.distill_through: loss, or model.divergence: k1"
    )

    @property
    def needs(self) -> ScoreRequest:
        """The whole distribution at every position."""
        return ScoreRequest(full=True)


class ForwardKL(FullDivergence):
    """KL(π_T‖π_θ) = Σ_v π_T (log π_T − log π_θ): covers all that the teacher does.

    As a reward, its sum over the rollout steers the policy to prefixes where the two agree.

    See *On-Policy Distillation of Language Models*, Agarwal et al., 2023, https://arxiv.org/abs/2306.13649.
    """

    sums_to = "forward_kl"

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return KL(π_T‖π_θ) [M] in nats/token."""
        return functional.forward_kl(*pair(self, student, teacher, "logits"))


class ReverseKL(FullDivergence):
    """KL(π_θ‖π_T) = Σ_v π_θ (log π_θ − log π_T): keeps to what the teacher finds likely.

    As a reward, its sum over the rollout steers the policy to prefixes where the two agree.

    See *On-Policy Distillation of Language Models*, Agarwal et al., 2023, https://arxiv.org/abs/2306.13649.
    """

    sums_to = "reverse_kl"

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return KL(π_θ‖π_T) [M] in nats/token."""
        return functional.reverse_kl(*pair(self, student, teacher, "logits"))


class JSD(FullDivergence):
    """w·KL(π_T‖m) + (1−w)·KL(π_θ‖m) with m = w·π_T + (1−w)·π_θ: bounded by ln 2.

    JSD/w tends to the forward KL for w → 0 and JSD/(1−w) to the reverse KL for w → 1; the formula itself is 0 at both
    ends, which are refused.

    See *On-Policy Distillation of Language Models*, Agarwal et al., 2023, https://arxiv.org/abs/2306.13649 (eq. 1).

    Args:
        teacher_weight: w, strictly between 0 and 1.

    Raises:
        ConfigError: `teacher_weight` is not strictly between 0 and 1.
    """

    def __init__(self, *, teacher_weight: float = 0.5) -> None:
        if not 0 < teacher_weight < 1:
            where = "model.divergence.teacher_weight: the divergence is 0 at both ends"
            hint = f"model.divergence: {'reverse_kl' if teacher_weight >= 1 else 'forward_kl'}"
            raise ConfigError(problem(where, got=teacher_weight, expected="0 < teacher_weight < 1", hint=hint))
        self.teacher_weight = teacher_weight

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return the divergence [M] in nats/token."""
        return functional.jsd(*pair(self, student, teacher, "logits"), teacher_weight=self.teacher_weight)
