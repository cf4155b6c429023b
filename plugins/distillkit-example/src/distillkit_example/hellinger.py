"""The squared Hellinger distance: `hellinger`."""

from __future__ import annotations

import math

from torch import Tensor

from distillkit.components import DivergenceEstimator
from distillkit.errors import ConfigError, ContractError, problem
from distillkit.types import ScoreRequest, TokenScores

__all__ = ["Hellinger"]


class Hellinger(DivergenceEstimator):
    """scale · ½ Σ_v (√π_T − √π_θ)²: symmetric, and never above `scale`, whatever the two have in common.

    See *Neue Begründung der Theorie quadratischer Formen von unendlichvielen Veränderlichen*, Hellinger, 1909,
    https://doi.org/10.1515/crll.1909.136.210.

    Args:
        scale: factor on the squared distance, above 0; 4 makes its curvature at equality that of a KL.

    Raises:
        ConfigError: `scale` is not above 0.

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 4)
        >>> Hellinger()(TokenScores(logits=even), TokenScores(logits=even)).item()
        0.0
    """

    allowed_through = ("loss", "reward")
    why_not = "it does not depend on the sampled token: set model.distill_through: loss"

    def __init__(self, *, scale: float = 1.0) -> None:
        if not 0 < scale < math.inf:
            raise ConfigError(problem("model.divergence.scale", got=scale, expected="above 0 and finite", hint="1.0"))
        self.scale = scale

    @property
    def needs(self) -> ScoreRequest:
        """The whole distribution at every position."""
        return ScoreRequest(full=True)

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return the scaled squared distance [M]."""
        if student.logits is None or teacher.logits is None or student.logits.shape != teacher.logits.shape:
            raise ContractError(problem("Hellinger: TokenScores.logits", expected="[M, V] on both sides"))
        # √π = exp(½·log π): the derivative of a square root at 0 would be infinite.
        ours = (0.5 * student.logits.float().log_softmax(-1)).exp()
        theirs = (0.5 * teacher.logits.detach().float().log_softmax(-1)).exp()
        return self.scale * 0.5 * (theirs - ours).square().sum(-1)
