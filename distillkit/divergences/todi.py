"""Forward or reverse KL, vocabulary entry by vocabulary entry: `todi`."""

from __future__ import annotations

from torch import Tensor

from distillkit.divergences._inputs import pair
from distillkit.divergences.full import FullDivergence
from distillkit.functional.divergences import todi
from distillkit.types import TokenScores

__all__ = ["ToDi"]


class ToDi(FullDivergence):
    """Σ_v a·π_T (log π_T − log π_θ) + (1−a)·π_θ (log π_θ − log π_T), a = σ(log π_T − log π_θ), detached.

    Forward KL on the vocabulary entries that the student underrates, reverse KL on those it overrates. The value is the
    Jeffreys divergence KL(π_T‖π_θ) + KL(π_θ‖π_T); what is new is the gradient, which the detached weight decides.

    See *ToDi: Token-wise Distillation via Fine-Grained Divergence Control*, Jung et al., 2025,
    https://arxiv.org/abs/2505.16297. Their runs add a cross-entropy of weight ½ and a temperature of 2, both settings
    of their own here (`model.distil_temperature`; `model.sft_weight` of `supervised`); the loss has no factor of the
    temperature squared.
    """

    def __call__(self, student: TokenScores, teacher: TokenScores) -> Tensor:
        """Return the divergence [M] in nats/token."""
        return todi(*pair(self, student, teacher, "logits"))
