"""Distil where the whole group failed: `group_level`."""

from __future__ import annotations

import torch

from distillkit.components import Masker
from distillkit.maskers._correctness import UnknownRule, check_unknown, correctness, distil_only
from distillkit.types import CORRECT, UNKNOWN, RewardOutput, RolloutBatch, TeacherScores, TokenWeights

__all__ = ["GroupLevel"]


class GroupLevel(Masker):
    """w_i = 1[no response of i's group is correct] on the distillation term. The policy term keeps every token.

    The teacher speaks where the group's rewards say nothing because every response failed.

    See *KDRL*, Xu et al., 2025, https://arxiv.org/abs/2506.02208 (section 3.4; read second-hand). No source settles
    what unknown correctness means here. A response that could not be scored is left out of its group, as it is for the
    advantage: the scored ones decide for the group, and `unknown` decides for the response itself. Unknown is not
    wrong, so the safe default drops it.

    Args:
        unknown: `drop` or `keep` the distillation term of responses of unknown correctness, in groups without a correct
            one.

    Raises:
        ConfigError: there are no rewards, or none of them can tell correctness.
    """

    def __init__(self, *, unknown: UnknownRule = "drop") -> None:
        self.unknown = check_unknown(unknown)

    def __call__(
        self, rollouts: RolloutBatch, rewards: RewardOutput | None, scores: TeacherScores | None
    ) -> TokenWeights:
        """Return factors [N, L]."""
        correct = correctness("group_level", rewards)
        _, group = torch.unique(rollouts.group_id, return_inverse=True)
        solved = torch.zeros(len(group), dtype=torch.long, device=group.device)
        solved = solved.index_add(0, group, (correct == CORRECT).long())
        chosen = solved[group] == 0
        if self.unknown == "drop":
            chosen = chosen & (correct != UNKNOWN)
        return distil_only(rollouts, chosen)
