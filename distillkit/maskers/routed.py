"""Rewards for correct responses, the teacher for wrong ones: `routed`."""

from __future__ import annotations

import torch

from distillkit.components import Masker
from distillkit.maskers._correctness import UnknownRule, check_unknown, correctness
from distillkit.types import CORRECT, UNKNOWN, WRONG, RewardOutput, RolloutBatch, TeacherScores, TokenWeights

__all__ = ["Routed"]


class Routed(Masker):
    """Policy weight c and distillation weight 1 − c, c = 1[response i is correct]: SRPO.

    With `divergence: k1` and `distill_through: advantage` a token's advantage is c·Â + (1 − c)·β·d, d = log π_T − log
    π_θ. A correct response learns from its reward alone, a wrong one from the teacher alone; its Â still counts in the
    group's mean. With a divergence as a loss the two terms are split the same way. Through the *reward* it cannot work:
    what a wrong response's divergence adds to its reward would meet a policy weight of 0.

    See arXiv 2609.04108, 2026, https://arxiv.org/abs/2609.04108 (SRPO, with β = 1). No source settles what a response
    of unknown correctness gets. It is not known to be correct, so the policy term leaves it out; unknown is not wrong,
    so by default the distillation term does too.

    Args:
        unknown: `drop` or `keep` the distillation term of responses whose correctness is unknown.

    Raises:
        ConfigError: there are no rewards, or none of them can tell correctness.
    """

    allowed_through = ("loss", "advantage")
    why_not = "what the divergence adds to a wrong response's reward meets a policy weight of 0"

    def __init__(self, *, unknown: UnknownRule = "drop") -> None:
        self.unknown = check_unknown(unknown)

    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        """Return factors [N, L]."""
        correct = correctness("routed", rewards)
        taught = correct == WRONG
        if self.unknown == "keep":
            taught = taught | (correct == UNKNOWN)
        ones = torch.ones(rollouts.tokens.shape, dtype=torch.float32, device=rollouts.tokens.device)
        policy, distil = (ones * chosen.to(ones.device).unsqueeze(1) for chosen in (correct == CORRECT, taught))
        return TokenWeights(policy=policy, distil=distil)
