"""The skew reverse KL: `skew_reverse_kl`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillkit.components import DivergenceEstimator
from distillkit.errors import ConfigError, ContractError, problem
from distillkit.types import ScoreRequest, TokenScores

__all__ = ["SkewReverseKL"]


class SkewReverseKL(DivergenceEstimator):
    """KL(π_θ‖m) with m = (1−α)·π_T + α·π_θ: the reverse KL, bounded by −log α where the teacher gives no mass.

    Gradient flows through both places where π_θ stands.

    See *DistiLLM: Towards Streamlined Distillation for Large Language Models*, Ko et al., 2024,
    https://arxiv.org/abs/2402.03898 (section 3.1).

    Args:
        alpha: α, the student's share of the mixture, strictly between 0 and 1.

    Raises:
        ConfigError: `alpha` is not strictly between 0 and 1.

    Example:
        >>> even = torch.zeros(1, 4)
        >>> SkewReverseKL()(TokenScores(logits=even), TokenScores(logits=even)).item()
        0.0
    """

    allowed_through = ("loss", "reward")
    why_not = "it does not depend on the sampled token: set model.distill_through: loss"

    def __init__(self, *, alpha: float = 0.1) -> None:
        if not 0 < alpha < 1:
            hint = "reverse_kl" if alpha == 0 else None
            raise ConfigError(
                problem("model.divergence.alpha", got=alpha, expected="strictly between 0 and 1", hint=hint)
            )
        self.alpha = alpha

    @property
    def needs(self) -> ScoreRequest:
        """The whole distribution at every position."""
        return ScoreRequest(full=True)

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return KL(π_θ‖m) [M] in nats/token."""
        if student.logits is None or teacher.logits is None or student.logits.shape != teacher.logits.shape:
            raise ContractError(problem("SkewReverseKL: TokenScores.logits", expected="[M, V] on both sides"))
        ours = student.logits.float().log_softmax(-1)
        theirs = teacher.logits.detach().float().log_softmax(-1)
        mixture = torch.logaddexp(theirs + math.log1p(-self.alpha), ours + math.log(self.alpha))
        possible = ours > -math.inf
        terms = torch.where(possible, ours, 0).exp() * torch.where(possible, ours - mixture, 0)
        return torch.where(possible, terms, 0).sum(-1)
