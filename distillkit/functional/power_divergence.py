"""The power-divergence family of Cressie and Read, between student and teacher. Nats/token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillkit.errors import ConfigError, problem
from distillkit.functional.divergences import forward_kl, reverse_kl
from distillkit.functional.logprobs import log_softmax

__all__ = ["power"]

_STEEPEST = 30.0
"""Nats: beyond e^30 a term of `_power` is its tangent."""

_LIMIT = 1e-20
"""So near to λ = 0 or −1 the next order of the series, λ times the gap, is far below rounding."""


def power(student_logits: Tensor, teacher_logits: Tensor, exponent: float = 2 / 3) -> Tensor:
    """Return the power divergence D_λ(π_T‖π_θ) = 1/(λ(λ+1)) · Σ_v π_T [(π_T/π_θ)^λ − 1]. [..., V] and [..., V] → [...].

    | λ | D_λ(π_T‖π_θ) |
    |---|---|
    | 1 | ½ Σ (π_T − π_θ)²/π_θ, half of Pearson's χ² |
    | 2/3 | Cressie and Read's recommendation |
    | 0 | KL(π_T‖π_θ), forward |
    | −½ | 2 Σ (√π_T − √π_θ)², four times the squared Hellinger distance |
    | −1 | KL(π_θ‖π_T), reverse |
    | −2 | ½ Σ (π_T − π_θ)²/π_T, half of Neyman's χ² |

    See *Multinomial Goodness-of-Fit Tests*, Cressie and Read, 1984, https://doi.org/10.1111/j.2517-6161.1984.tb01318.x.

    For λ > 0 (or < −1) a term grows like a power of the ratio. Above e^30 it goes on as its tangent (at λ = 2/3 from 45
    nats between the two on): value and gradient stay finite and the gradient does not vanish.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V].
        exponent: λ.

    Returns:
        [...] nats/token.

    Raises:
        ConfigError: `exponent` is not finite.

    Example:
        >>> round(power(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log(), 1.0).item(), 4)
        0.125
    """
    if not math.isfinite(exponent):
        raise ConfigError(problem("power.exponent", got=exponent, expected="a finite number"))
    if abs(exponent) < _LIMIT:
        return forward_kl(student_logits, teacher_logits)
    if abs(exponent + 1) < _LIMIT:
        return reverse_kl(student_logits, teacher_logits)
    # A finite floor, far below any log-prob that counts: a token impossible on both sides has no ratio.
    student, teacher = (log_softmax(logits).clamp(min=-1e30) for logits in (student_logits, teacher_logits))
    # D_λ(p‖q) = D_{−1−λ}(q‖p): of the two, the one further from the pole at −1.
    if exponent < -0.5:
        return _power(student, teacher, -1 - exponent)
    return _power(teacher, student, exponent)


def _power(logp: Tensor, logq: Tensor, exponent: float) -> Tensor:
    """D_λ(p‖q) for λ ≥ −½ and finite log-probs."""
    # p·(e^x − 1): by expm1 where x is small (the two cancel), by one exponent elsewhere (p may be tiny, e^x huge).
    x = exponent * (logp - logq)
    small = x.abs() <= 1
    near = logp.exp() * torch.expm1(torch.where(small, x, 0.0))
    steep = torch.where(small, 0.0, (1 + exponent) * logp - exponent * logq)
    far = steep.clamp(max=_STEEPEST).exp() * (1 + (steep - _STEEPEST).clamp(min=0)) - logp.exp()
    return torch.where(small, near, far).sum(dim=-1) / exponent / (1 + exponent)
