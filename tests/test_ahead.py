"""Rollouts sampled ahead and scores asked for early are those that the plain step has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from distillkit.ahead import RolloutsAhead, sampled
from distillkit.early import EarlyScores
from distillkit.errors import RolloutError
from distillkit.teachers.local import LocalTeacher
from distillkit.types import RolloutBatch, RolloutGroup, SampleRequest, ScoreRequest
from tests import toy

PROMPTS = [[3, 4], [5, 6, 7]]


class Broken(toy.RandomSampler):
    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        raise RolloutError("the server is gone")


def nothing(group: RolloutGroup) -> None:
    pass


def test_rollouts_ahead_are_those_of_the_sampler_and_survive_a_checkpoint() -> None:
    requests, sampler = toy.requests(PROMPTS), toy.RandomSampler(group_size=4, max_new_tokens=8)
    plain = sampled(sampler, requests, nothing)
    ahead, heard = RolloutsAhead(), list[int]()
    ahead.start(sampler, requests, lambda group: heard.append(group.request.group_id))
    state = ahead.state_dict()
    taken = ahead.take(requests)
    assert taken is not None and sorted(taken) == sorted(plain) == sorted(heard)
    restored = RolloutsAhead()
    restored.load_state_dict(state)
    again = restored.take(requests)
    assert again is not None
    for i, group in plain.items():
        for ours, mine, theirs in zip(taken[i].rollouts, again[i].rollouts, group.rollouts, strict=True):
            assert torch.equal(ours.completion_ids, theirs.completion_ids)
            assert torch.equal(mine.completion_ids, theirs.completion_ids)
    assert ahead.take(requests) is None
    ahead.close()


def test_an_error_of_the_sampler_comes_out_where_its_rollouts_are_taken() -> None:
    ahead, requests = RolloutsAhead(), toy.requests(PROMPTS)
    ahead.start(Broken(group_size=4, max_new_tokens=8), requests, nothing)
    ahead.wait()
    with pytest.raises(RolloutError, match="the server is gone"):
        ahead.take(requests)
    ahead.close()


def test_early_scores_equal_those_of_the_whole_batch(tmp_path: str) -> None:
    toy.model(1).save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    teacher = LocalTeacher(path=str(tmp_path))
    teacher.setup(toy.info())
    groups = list(toy.RandomSampler(group_size=4, max_new_tokens=8).sample(toy.requests(PROMPTS)))
    rollouts, request = RolloutBatch.from_groups(groups, 0), ScoreRequest(sampled=True, topk=3)
    early = EarlyScores(teacher, toy.info())
    for group in groups:
        early.ask(group, request)
    ours, whole = early.collect(rollouts, request), teacher.score(rollouts, request)
    assert ours is not None and ours.sampled is not None and whole.sampled is not None
    assert torch.equal(ours.valid, whole.valid)
    torch.testing.assert_close(ours.sampled, whole.sampled)
    assert ours.topk is not None and whole.topk is not None and ours.topk.shape == whole.topk.shape
    torch.testing.assert_close(ours.topk, whole.topk)
    early.ask(groups[0], request)
    assert early.collect(rollouts, request) is None, "one group was not asked for"
    for group in groups:
        early.ask(group, request)
    assert early.collect(rollouts, ScoreRequest(sampled=True)) is None, "other scores were asked for"
    assert not early._asked, "and nobody will collect these"
    early.close()
