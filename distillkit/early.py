"""Scores that are asked for while other rollouts are still being sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.types import RolloutBatch, RolloutGroup, ScoreRequest, TeacherScores

__all__ = ["EarlyScores", "joined"]

_THREADS = 16


class EarlyScores:
    """Asks a scorer that works elsewhere for each group as soon as it is finished.

    Args:
        scorer: `elsewhere` is true of it, and its `score` may be called from several threads.
        student: padding token and device of the rollouts.
    """

    def __init__(self, scorer: TeacherScorer, student: StudentInfo) -> None:
        self._scorer = scorer
        self._student = student
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="early-scores")
        self._asked: dict[tuple[int, ScoreRequest], Future[TeacherScores]] = {}

    def ask(self, group: RolloutGroup, request: ScoreRequest) -> None:
        """Send one finished group."""
        rollouts = RolloutBatch.from_groups([group], self._student.pad_token_id).to(self._student.device)
        self._asked[group.request.group_id, request] = self._threads.submit(self._scorer.score, rollouts, request)

    def collect(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores | None:
        """Wait for the scores of the whole batch; None when not all of it was asked for. Other groups' are kept.

        Raises:
            Exception: what the scorer raised.
        """
        groups = list(dict.fromkeys(rollouts.group_id.tolist()))
        own = [key for key in tuple(self._asked) if key[0] in set(groups)]
        asked = {key: self._asked.pop(key) for key in own}
        if any((group, request) not in asked for group in groups):
            return None
        return joined([asked[group, request].result() for group in groups], rollouts.tokens.shape[1])

    def close(self) -> None:
        """Forget what was asked for, without waiting for the scorer: its `teardown` ends what it is at."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def joined(parts: Sequence[TeacherScores], length: int) -> TeacherScores:
    """Return the scores [N, L] of all parts [n, l], in their order, padded to `length` positions; no distributions."""

    def grid(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if any(tensor is None for tensor in tensors):
            return None
        return torch.cat([_padded(tensor, length) for tensor in tensors])

    valid = grid("valid")
    assert valid is not None
    return TeacherScores(
        valid=valid, sampled=grid("sampled"), topk_ids=grid("topk_ids"), topk=grid("topk"), entropy=grid("entropy")
    )


def _padded(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing))
