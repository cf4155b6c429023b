"""Distil wrong responses only: `response_level`."""

from __future__ import annotations

from distillkit.components import Masker
from distillkit.maskers._correctness import UnknownRule, check_unknown, correctness, distil_only
from distillkit.types import UNKNOWN, WRONG, RewardOutput, RolloutBatch, TeacherScores, TokenWeights

__all__ = ["ResponseLevel"]


class ResponseLevel(Masker):
    """w_i = 1[response i is wrong] on the distillation term: KDRL-Masking. The policy term keeps every token.

    The student is not pulled away from solutions of its own that work.

    See *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208 (section 3.4; read second-hand). The paper's reward is
    0 or 1; no source settles what a response of unknown correctness (timed out, no gold answer) gets. Unknown is not
    wrong and the method distils wrong responses, so the safe default drops it.

    Args:
        unknown: `drop` or `keep` the distillation term of responses whose correctness is unknown.

    Raises:
        ConfigError: there are no rewards, or none of them can tell correctness.
    """

    def __init__(self, *, unknown: UnknownRule = "drop") -> None:
        self.unknown = check_unknown(unknown)

    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        """Return factors [N, L]."""
        correct = correctness("response_level", rewards)
        chosen = correct == WRONG
        if self.unknown == "keep":
            chosen = chosen | (correct == UNKNOWN)
        return distil_only(rollouts, chosen)
