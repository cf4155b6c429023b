"""Estimators that see the log-prob of the sampled token alone: `k1`, `k2`, `k3`.

Cheap for the teacher (one number per token, any server gives it), noisy for the student. Their expectations hold for
tokens drawn from the student; see `distillkit.functional.divergences` for the table.
"""

from __future__ import annotations

import math

from torch import Tensor

from distillkit.components import DivergenceEstimator
from distillkit.divergences._inputs import pair
from distillkit.errors import ConfigError, problem
from distillkit.functional import divergences as functional
from distillkit.types import ScoreRequest, TokenScores

__all__ = ["K1", "K2", "K3"]

_BLIND = (
    "as an advantage or reward it would push down the tokens that the teacher prefers as hard as those it rejects: "
    "set model.distill_through: loss, or model.divergence: k1"
)


class _Sampled(DivergenceEstimator):
    @property
    def needs(self) -> ScoreRequest:
        """The log-prob of the sampled token."""
        return ScoreRequest(sampled=True)


class K1(_Sampled):
    """log π_θ − log π_T at the sampled token: the reverse KL as a policy-gradient signal.

    As a detached advantage (−k1 times ∇log π_θ) its expected gradient is that of KL(π_θ‖π_T) per prefix; as a reward it
    is that of the whole sequence. As a loss its expected gradient is exactly zero, so that is refused. It can be
    negative.

    See *Approximating KL Divergence*, John Schulman, 2020, http://joschu.net/blog/kl-approx.html, and *On-Policy
    Distillation*, Kevin Lu and Thinking Machines Lab, 2025, https://thinkingmachines.ai/blog/on-policy-distillation/.
    """

    allowed_through = ("advantage", "reward")
    why_not = "its expected gradient as a loss is zero: set model.distill_through: advantage"

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return k1 [M] in nats/token."""
        return functional.k1(*pair(self, student, teacher, "sampled"))


class K2(_Sampled):
    """½ (log π_θ − log π_T)² at the sampled token: KDRL's estimator, a loss with the reverse KL's expected gradient.

    Its gradient per token, log π_θ − log π_T, has no bound: a saturated teacher finds tokens near-impossible (−15 nats
    and less). `bound` limits the *gradient* (½d² becomes linear beyond it); the token keeps its pull. No source settles
    whether KDRL bounds it, so the default is the formula as written; 5 to 10 is a safe choice.

    See *Approximating KL Divergence*, John Schulman, 2020, http://joschu.net/blog/kl-approx.html, and *KDRL*, Xu et
    al., 2025, https://arxiv.org/abs/2506.02208 (appendix A.3; read second-hand).

    Args:
        bound: largest gradient in log π_θ, in nats; null is unbounded.

    Raises:
        ConfigError: `bound` is not a positive number.
    """

    allowed_through = ("loss",)
    why_not = _BLIND

    def __init__(self, *, bound: float | None = None) -> None:
        if bound is not None and not (0 < bound < math.inf):
            where = "model.divergence.bound: the gradient's bound is a positive number of nats"
            raise ConfigError(problem(where, got=bound, expected="> 0, or null for no bound", hint="5.0"))
        self.bound = bound

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return k2 [M] in nats/token."""
        ours, theirs = pair(self, student, teacher, "sampled")
        return functional.k2(ours, theirs) if self.bound is None else functional.bounded_k2(ours, theirs, self.bound)


class K3(_Sampled):
    """e^d − d − 1, d = log π_T − log π_θ at the sampled token: never negative, unbiased for KL(π_θ‖π_T) as a value.

    As a loss it follows the *forward* KL(π_T‖π_θ), not the KL it estimates. Its gradient e^d − 1 grows without limit
    for tokens that the teacher finds far likelier than the student (d above 88 overflows float32; tokens sampled from
    the student do not get there).

    See *Approximating KL Divergence*, John Schulman, 2020, http://joschu.net/blog/kl-approx.html.
    """

    allowed_through = ("loss",)
    why_not = _BLIND

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return k3 [M] in nats/token."""
        return functional.k3(*pair(self, student, teacher, "sampled"))
