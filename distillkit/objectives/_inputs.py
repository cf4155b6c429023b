"""Take what an objective asked for out of the teacher's scores."""

from __future__ import annotations

from torch import Tensor

from distillkit.errors import ContractError, problem
from distillkit.types import TeacherScores

__all__ = ["sampled_scores"]


def sampled_scores(objective: str, scores: TeacherScores | None) -> tuple[Tensor, Tensor]:
    """Return where the teacher has a score [n, L] bool, and its log-probs of the sampled tokens [n, L], detached.

    Raises:
        ContractError: it gave none.
    """
    if scores is None or scores.sampled is None:
        where = f"{objective}: the teacher's log-probs of the sampled tokens"
        raise ContractError(problem(where, got=None, expected="TeacherScores.sampled [n, L]"))
    return scores.valid, scores.sampled.detach()
