"""A learning rate for a run of known length."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distillkit.errors import ConfigError, problem

__all__ = ["WarmupCosine"]


class WarmupCosine(LRScheduler):
    """Linear warm-up to the optimizer's learning rate, then half a cosine down to `final_share` of it.

    share(s) = (s + 1) / w for s < w, then f + (1 − f) · (1 + cos(π · p)) / 2 with p = (s − w) / (n − w), at most 1.

    Args:
        optimizer: whose learning rate is the highest.
        total_steps: n, steps until the end; the rate stays there afterwards.
        warmup_steps: w.
        final_share: f.

    Raises:
        ConfigError: `warmup_steps` not below `total_steps`, or a share outside 0 to 1.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> schedule = WarmupCosine(optimizer, total_steps=6, warmup_steps=2)
        >>> [round(2.0 * schedule.share(s), 3) for s in range(8)]
        [1.0, 2.0, 2.0, 1.707, 1.0, 0.293, 0.0, 0.0]
    """

    def __init__(
        self, optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, final_share: float = 0.0
    ) -> None:
        if not 0 <= warmup_steps < total_steps:
            got = f"warmup_steps {warmup_steps}, total_steps {total_steps}"
            raise ConfigError(problem("model.lr_scheduler", got=got, expected="0 <= warmup_steps < total_steps"))
        if not 0 <= final_share <= 1:
            raise ConfigError(problem("model.lr_scheduler.final_share", got=final_share, expected="0 to 1"))
        self.total_steps, self.warmup_steps, self.final_share = total_steps, warmup_steps, final_share
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group at the current step."""
        share = self.share(self.last_epoch)
        return [base * share for base in self.base_lrs]

    def share(self, step: int) -> float:
        """Return the share of the optimizer's learning rate at step `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        past = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * past)) / 2
