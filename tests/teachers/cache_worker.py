"""One of several processes on one cache: `python -m tests.teachers.cache_worker FOLDER SEED ROUNDS GIB`."""

from __future__ import annotations

import json
import random
import sys

import torch

from distillkit.teachers.cached import CachedTeacher
from distillkit.testing import FakeTeacher, rollout_batch, student_info
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

REQUEST = ScoreRequest(sampled=True, topk=3)


class PerToken(FakeTeacher):
    """A score that a wrong or torn entry cannot have: it follows from the token and its place."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        shape = rollouts.tokens.shape
        place = torch.arange(shape[1]).expand(shape)
        sampled = -(rollouts.tokens + place / 1000.0).masked_fill(~rollouts.loss_mask, 0.0)
        topk = -(rollouts.tokens[..., None] + torch.arange(request.topk) / 10.0)
        ids = (rollouts.tokens[..., None] + torch.arange(request.topk)) % 99
        return TeacherScores(valid=rollouts.loss_mask, sampled=sampled, topk=topk, topk_ids=ids)


def batch(numbers: list[int]) -> RolloutBatch:
    """One rollout per number."""
    return rollout_batch({"1+1=": [f"{number:05d}" for number in numbers]}, max_new_tokens=8)


def wrong(scores: TeacherScores, rollouts: RolloutBatch) -> bool:
    expected = PerToken().score(rollouts, REQUEST)
    mask = rollouts.loss_mask
    pairs = [(getattr(scores, name), getattr(expected, name)) for name in ("sampled", "topk", "topk_ids", "valid")]
    return not all(torch.equal(ours[mask], theirs[mask]) for ours, theirs in pairs)


def main(folder: str, seed: int, rounds: int, gib: float) -> None:
    draw = random.Random(seed)
    part = CachedTeacher(teacher=PerToken(), dir=folder, max_memory_gib=0, max_disk_gib=gib)
    part.setup(student_info())
    for _ in range(rounds):
        rollouts = batch([draw.randrange(60) for _ in range(8)])
        if wrong(part.score(rollouts, REQUEST), rollouts):
            raise SystemExit(f"a wrong score, seed {seed}")
    print(json.dumps(dict(part.counts)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
