"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_advantages"]


def group_advantages(
    rewards: Tensor, group_id: Tensor, std: bool = True, correction: int = 1, eps: float = 1e-6
) -> Tensor:
    """Return Â_i = (R_i − mean_G R) / (std_G R + eps) over the scored rollouts of each group.

    See *DeepSeekMath*, Shao et al., 2024, https://arxiv.org/abs/2402.03300 (section 4.1); without `std`: *Understanding
    R1-Zero-Like Training* (Dr. GRPO), Liu et al., 2025, https://arxiv.org/abs/2503.20783.

    Args:
        rewards: [N] float; NaN is "not scored": left out of its group, its own advantage is 0.
        group_id: [N] int64; groups may be ragged and in any order.
        std: divide by the group's standard deviation.
        correction: 1 the sample standard deviation, 0 the population's.
        eps: added to the standard deviation.

    Returns:
        [N] float32, detached. A group with fewer than two scored rollouts, or with all rewards equal, gets exactly 0.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 8]), std=False).tolist()
        [0.5, -0.5, 0.0]
    """
    values, scored = rewards.detach().double(), ~rewards.isnan()
    filled = values.masked_fill(~scored, 0.0)
    _, group = torch.unique(group_id, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0

    def total(x: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64, device=x.device).index_add(0, group, x)[group]

    count = total(scored.double())
    centred = filled - total(filled) / count.clamp(min=1)
    highest = torch.full((groups,), -torch.inf, dtype=torch.float64, device=values.device)
    highest = highest.scatter_reduce(0, group, values.masked_fill(~scored, -torch.inf), "amax")[group]
    lowest = torch.full((groups,), torch.inf, dtype=torch.float64, device=values.device)
    lowest = lowest.scatter_reduce(0, group, values.masked_fill(~scored, torch.inf), "amin")[group]
    # Equal rewards are compared, not subtracted: a mean of equal numbers may differ from them by a rounding error,
    # which a tiny standard deviation would blow up.
    informative = scored & (count >= 2) & (highest > lowest)
    if std:
        squares = total(torch.where(scored, centred.square(), 0.0))
        centred = centred / ((squares / (count - correction).clamp(min=1)).sqrt() + eps)
    return torch.where(informative, centred, 0.0).float()
