"""A divergence of K tokens per position: `topk`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distillkit.components import DivergenceEstimator
from distillkit.divergences._inputs import pair
from distillkit.errors import ConfigError, problem
from distillkit.functional.divergences import topk_forward_kl, topk_reverse_kl
from distillkit.types import ScoreRequest, TokenScores

__all__ = ["TopK"]


class TopK(DivergenceEstimator):
    """KL over K tokens, all others in one tail bucket: Σ_{v∈K} p (log p − log q) + p_rest (log p_rest − log q_rest).

    With the bucket it is a real divergence (≥ 0, a lower bound of the full KL, equal to it for K ≥ V−1). Without it the
    sum is truncated: it can be negative, and its reverse direction falls when the student moves mass out of the K
    tokens. KDRL's own top-k form is known second-hand only and no source settles it; the bucket is the safe default.

    The teacher's K most likely tokens can come from a server or a cache. The student's (`chosen_by: student`) are where
    its own mass is, which suits the reverse direction, but asks the teacher for any token's probability.

    See *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208 (appendix A.3; read second-hand).

    Args:
        k: tokens kept per position.
        direction: `reverse` is KL(π_θ‖π_T), `forward` KL(π_T‖π_θ).
        tail: keep the remaining mass as one bucket.
        chosen_by: whose K most likely tokens, `teacher` or `student`.

    Raises:
        ConfigError: `k` below 1, or an unknown `direction` or `chosen_by`.
    """

    allowed_through = ("loss", "reward")
    why_not = (
        "it does not depend on the sampled token, so its expected gradient as an advantage is zero: "
        "set model.distill_through: loss, or model.divergence: k1"
    )

    def __init__(
        self,
        *,
        k: int = 64,
        direction: Literal["reverse", "forward"] = "reverse",
        tail: bool = True,
        chosen_by: Literal["teacher", "student"] = "teacher",
    ) -> None:
        for name, value, ok, expected in (
            ("k", k, k >= 1, "at least 1 token"),
            ("direction", direction, direction in ("reverse", "forward"), "reverse or forward"),
            ("chosen_by", chosen_by, chosen_by in ("teacher", "student"), "teacher or student"),
        ):
            if not ok:
                raise ConfigError(problem(f"model.divergence.{name}", got=value, expected=expected))
        self.k = k
        self.direction = direction
        self.tail = tail
        self.chosen_by = chosen_by

    @property
    def needs(self) -> ScoreRequest:
        """Log-probs of K tokens, chosen by the teacher or by the student."""
        return ScoreRequest(topk=self.k) if self.chosen_by == "teacher" else ScoreRequest(student_topk=self.k)

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return the divergence [M] in nats/token."""
        divergence = topk_reverse_kl if self.direction == "reverse" else topk_forward_kl
        return divergence(*pair(self, student, teacher, "topk"), tail=self.tail)
