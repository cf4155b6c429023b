"""Parts that are broken on purpose, for a recipe to name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from distillkit.rewards.answer import AnswerReward
from distillkit.samplers.hf import HFSampler
from distillkit.scorer import StudentScorer
from distillkit.teachers.local import LocalTeacher
from distillkit.types import RewardOutput, RolloutBatch, RolloutGroup, SampleRequest, ScoreRequest, TeacherScores


class NaNTeacher(LocalTeacher):
    """A teacher whose weights have overflowed."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        return replace(scores, sampled=torch.where(rollouts.tokens % 5 == 0, float("nan"), scores.sampled))


class DiceTeacher(LocalTeacher):
    """A teacher that changes its mind."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        scores = super().score(rollouts, request)
        assert scores.sampled is not None
        return replace(scores, sampled=scores.sampled - torch.rand_like(scores.sampled))


class BrokenTeacher(LocalTeacher):
    """A teacher that raises something of its own."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        raise KeyboardInterrupt("a library's own interrupt")


class HungTeacher(LocalTeacher):
    """A teacher that does not answer."""

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        time.sleep(3600)
        raise AssertionError("slept through the test")


class StrictAnswer(AnswerReward):
    """A verifier that finds nothing right."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        found = super().__call__(rollouts)
        return replace(found, correct=torch.zeros_like(found.correct), values=torch.zeros_like(found.values))


class StaleSampler(HFSampler):
    """An engine that takes its first weights and no others."""

    same_engine = False
    _copy: Any = None

    def sync(self, student: StudentScorer) -> None:
        if self._copy is None:
            import copy

            self._copy = copy.deepcopy(student)
        super().sync(self._copy)


class HotSampler(HFSampler):
    """An engine that draws at another temperature than it was told."""

    same_engine = False

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        yield from super().sample([replace(r, settings=replace(r.settings, temperature=3.0)) for r in requests])
