"""KLs whose target leans towards the other side: `skew_forward_kl`, `skew_reverse_kl`."""

from __future__ import annotations

from torch import Tensor

from distillkit.divergences._inputs import pair
from distillkit.divergences.full import FullDivergence
from distillkit.errors import ConfigError, problem
from distillkit.functional import divergences as functional
from distillkit.types import TokenScores

__all__ = ["SkewForwardKL", "SkewReverseKL"]


def _checked(weight: float, plain: str) -> float:
    if not 0 <= weight < 1:
        where = "model.divergence.weight: at 1 both sides are the same and the divergence is 0"
        hint = f"0.1, or model.divergence: {plain} for none"
        raise ConfigError(problem(where, got=weight, expected="0 <= weight < 1", hint=hint))
    return weight


class SkewForwardKL(FullDivergence):
    """KL(π_T‖w·π_T + (1−w)·π_θ): the forward KL with a bounded value (−log w) and a bounded gradient.

    A token that the student finds near-impossible no longer dominates the gradient. w = 0 is the forward KL.

    See *DistiLLM: Towards Streamlined Distillation for Large Language Models*, Ko et al., 2024,
    https://arxiv.org/abs/2402.03898 (section 3.1; 0.1 is theirs).

    Args:
        weight: w, the teacher's share of the mixture, from 0 to below 1.

    Raises:
        ConfigError: `weight` is not in [0, 1).
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        self.weight = _checked(weight, "forward_kl")

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return KL(π_T‖m) [M] in nats/token."""
        return functional.skew_forward_kl(*pair(self, student, teacher, "logits"), weight=self.weight)


class SkewReverseKL(FullDivergence):
    """KL(π_θ‖w·π_θ + (1−w)·π_T): the reverse KL with a bounded value (−log w), also where the teacher gives no mass.

    Gradient flows through both places where π_θ stands. w = 0 is the reverse KL.

    See *DistiLLM: Towards Streamlined Distillation for Large Language Models*, Ko et al., 2024,
    https://arxiv.org/abs/2402.03898 (section 3.1; 0.1 is theirs).

    Args:
        weight: w, the student's share of the mixture, from 0 to below 1.

    Raises:
        ConfigError: `weight` is not in [0, 1).
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        self.weight = _checked(weight, "reverse_kl")

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return KL(π_θ‖m) [M] in nats/token."""
        return functional.skew_reverse_kl(*pair(self, student, teacher, "logits"), weight=self.weight)
