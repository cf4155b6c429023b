"""Normalisation as a coefficient: each loss term is Σ c·ℓ with a detached c [N, L].

c holds mask, aggregation and the *global* denominator (over every micro-batch and every rank of one update), so that
the gradient does not depend on how the update is split.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["denominator", "token_coefficients"]

Aggregation = Literal["token", "sequence", "constant"]


def denominator(eligible: Tensor, aggregation: Aggregation, constant_length: int = 1) -> Tensor:
    """Return this rank's share of the denominator, a float64 scalar to be summed over ranks.

    `token`: eligible tokens. `sequence`: rollouts with an eligible token. `constant`: such rollouts ×
    `constant_length`.

    Args:
        eligible: [N, L] bool, *before* the masker unless `normalize: kept`.
        aggregation: see above.
        constant_length: tokens.

    Example:
        >>> eligible = torch.tensor([[True, True], [True, False]])
        >>> [denominator(eligible, a, 4).item() for a in ("token", "sequence", "constant")]
        [3.0, 2.0, 8.0]
    """
    if aggregation == "token":
        return eligible.sum(dtype=torch.float64)
    rollouts = eligible.any(dim=1).sum(dtype=torch.float64)
    return rollouts * constant_length if aggregation == "constant" else rollouts


def token_coefficients(eligible: Tensor, weights: Tensor, aggregation: Aggregation, total: Tensor | float) -> Tensor:
    """Return c [N, L] float32, detached, such that the term is Σ c·ℓ.

    `token` and `constant`: c = w / total. `sequence`: c = w / (|y_i| · total), |y_i| the rollout's eligible tokens. 0
    off `eligible`, and everywhere when `total` is 0.

    Args:
        eligible: [N, L] bool.
        weights: [N, L] float32, the masker's factors.
        aggregation: as given to `denominator`.
        total: the denominator summed over ranks.

    Example:
        >>> eligible = torch.tensor([[True, True], [True, False]])
        >>> token_coefficients(eligible, torch.ones(2, 2), "sequence", 2.0).tolist()
        [[0.25, 0.25], [0.5, 0.0]]
    """
    total = float(total)
    if total == 0:
        return torch.zeros_like(weights)
    per_rollout = torch.full((len(eligible), 1), total, dtype=torch.float64, device=eligible.device)
    if aggregation == "sequence":
        per_rollout = per_rollout * eligible.sum(dim=1, keepdim=True).clamp(min=1)
    return (weights.detach().double() * eligible / per_rollout).float()
