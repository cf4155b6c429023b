"""Group-relative policy optimization: `grpo`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

import torch
from torch import Tensor

from distillkit.components import Aggregation, PolicyObjective
from distillkit.errors import ConfigError, problem
from distillkit.functional.advantages import group_advantages
from distillkit.functional.objectives import clipped_policy_loss, dual_clip
from distillkit.types import RewardOutput, RolloutBatch, StudentScores, TeacherScores

__all__ = ["GRPO"]


class GRPO(PolicyObjective):
    """−min(r·Â, clip(r, 1−clip_low, 1+clip_high)·Â), r = π_θ/π_old, Â_i = (R_i − mean_G R)/(std_G R + eps).

    Groups are formed by `group_id`; a rollout without a reward is left out of its group and gets Â = 0. Rewards of
    single tokens, where a reward gives them, are added to Â after the group's normalisation (so a group's std does not
    rescale them).

    | switch | GRPO (as published) | Dr. GRPO | DAPO |
    |---|---|---|---|
    | `std` | true | false | true |
    | `aggregation` | sequence | constant | token |
    | `clip_high` | 0.2 | 0.2 | 0.28 |

    See *DeepSeekMath*, Shao et al., 2024, https://arxiv.org/abs/2402.03300; *Dr. GRPO*, Liu et al., 2025,
    https://arxiv.org/abs/2503.20783; *DAPO*, Yu et al., 2025, https://arxiv.org/abs/2503.14476; dual clip: Ye et al.,
    2020, https://arxiv.org/abs/1912.09729. The KL to a reference is `model.reference`, not part of this loss.

    No source settles KDRL's choices (*KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208: token or sequence mean,
    std or none, the clip); the defaults are the symmetric clip, the std, and the token mean, under which every
    token counts alike (a mean per rollout makes the tokens of long wrong rollouts count less).

    Args:
        std: divide by the group's standard deviation.
        correction: 1 the sample standard deviation, 0 the population's.
        eps: added to the standard deviation.
        aggregation: `token` mean over the update's tokens, `sequence` mean per rollout and then over rollouts,
            `constant` sum divided by a constant length.
        constant_length: that length, in tokens; null is the sampler's `max_new_tokens`.
        clip_low: how far below 1 the ratio may count.
        clip_high: how far above 1.
        dual_clip: cap of the loss at dual_clip·|Â| where Â < 0; above 1, null for none.

    Raises:
        ConfigError: an argument out of its range, at the start or, where `model.schedules` moves it, at that step.
    """

    def __init__(
        self,
        *,
        std: bool = True,
        correction: int = 1,
        eps: float = 1e-6,
        aggregation: Aggregation = "token",
        constant_length: int | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
    ) -> None:
        self.std = std
        self.correction = correction
        self.eps = eps
        self.aggregation = aggregation
        self.constant_length = constant_length
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip
        self._check("model.objective")

    def _limits(self) -> Iterator[tuple[str, bool, str]]:
        """Yield name, whether its value is in range, and the range of every argument."""
        unused = self.constant_length is not None and self.aggregation != "constant"
        length_fits = self.constant_length is None or (self.constant_length >= 1 and not unused)
        lengths = "null unless aggregation is constant" if unused else "at least 1 token, or null"
        yield "correction", self.correction in (0, 1), "0 (population) or 1 (sample)"
        yield "eps", self.eps >= 0, "at least 0"
        yield "aggregation", self.aggregation in get_args(Aggregation), "token, sequence or constant"
        yield "constant_length", length_fits, lengths
        yield "clip_low", 0 <= self.clip_low <= 1, "between 0 and 1"
        yield "clip_high", self.clip_high >= 0, "at least 0"
        yield "dual_clip", self.dual_clip is None or self.dual_clip > 1, "above 1, or null for none"

    def _check(self, where: str) -> None:
        # Called by whatever uses the numbers too: a schedule sets them behind the constructor's back.
        for name, ok, expected in self._limits():
            if not ok:
                raise ConfigError(problem(f"{where}.{name}", got=getattr(self, name), expected=expected))

    def advantages(self, rollouts: RolloutBatch, rewards: RewardOutput, scores: TeacherScores | None) -> Tensor:
        """Return Â [N, L]: the rollout's on each of its `loss_mask` tokens, plus the token's own reward."""
        self._check("model.schedules.objective")
        total = rewards.total
        per_rollout = group_advantages(total, rollouts.group_id, self.std, self.correction, self.eps)
        per_token = per_rollout.unsqueeze(1).expand(rollouts.tokens.shape)
        if rewards.token_values is not None:
            own = rewards.token_values.detach().nan_to_num(nan=0.0)
            per_token = per_token + own.masked_fill(total.isnan().unsqueeze(1), 0.0)
        return torch.where(rollouts.loss_mask, per_token, 0.0)

    def log_ratio(self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None) -> Tensor:
        """Return log r [n, L], the ratio that is clipped; carries gradient into the student's log-probs alone."""
        return student.logprobs - old_logprobs.detach()

    def loss(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Tensor:
        """Return the clipped loss [n, L]."""
        self._check("model.schedules.objective")
        log_ratio = self.log_ratio(student, old_logprobs, scores)
        loss = clipped_policy_loss(log_ratio, advantages, self.clip_low, self.clip_high)
        return loss if self.dual_clip is None else dual_clip(loss, advantages, self.dual_clip)

    @torch.no_grad()
    def diagnostics(
        self, student: StudentScores, old_logprobs: Tensor, scores: TeacherScores | None, advantages: Tensor
    ) -> Mapping[str, Tensor]:
        """Return the ratio, where a clip took the gradient away, and the policy's distance from the old one.

        `ratio` is r; `clipped_high`, `clipped_low`, `clipped_dual` are 1 where that bound binds and the gradient is
        zero; `reverse_kl_to_old` = ρ·log ρ − ρ + 1 with ρ = π_θ/π_old: at least 0, unbiased for KL(π_θ‖π_old) over
        tokens of π_old.
        """
        ratio = self.log_ratio(student, old_logprobs, scores).exp()
        moved = student.logprobs - old_logprobs
        found = {
            "ratio": ratio,
            "clipped_high": ((advantages > 0) & (ratio > 1 + self.clip_high)).float(),
            "clipped_low": ((advantages < 0) & (ratio < 1 - self.clip_low)).float(),
            "reverse_kl_to_old": moved.exp() * moved - torch.expm1(moved),
        }
        if self.dual_clip is not None:
            found["clipped_dual"] = ((advantages < 0) & (ratio > self.dual_clip)).float()
        return found
