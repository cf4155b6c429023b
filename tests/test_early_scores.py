"""Teachers on servers are asked while rollouts are being sampled, whichever way they are combined."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distillkit.backends import LocalBackend
from distillkit.betas.constant import Constant
from distillkit.clock import PhaseClock
from distillkit.components import TeacherScorer
from distillkit.divergences.sampled import K2
from distillkit.divergences.topk import TopK
from distillkit.early import EarlyScores
from distillkit.errors import ScoringError
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts
from distillkit.samplers.hf import HFSampler
from distillkit.step import DistillationStep
from distillkit.teachers.cached import CachedTeacher
from distillkit.teachers.mixture import MixtureTeacher
from distillkit.teachers.vllm import VLLMTeacher
from distillkit.testing import char_tokenizer, sample_requests, student_info, tiny_model, tiny_student
from distillkit.types import RolloutBatch, RolloutGroup, SampleRequest, ScoreRequest, TeacherScores
from tests.teachers.fake_vllm import FakeVLLM, running, status, waits

KINDS = ["plain", "by row", "averaged", "cached", "by row, each cached"]
PROMPTS = ["1+1=", "2+3=", "7*8=", "9-4=", "5+5=", "6*6="]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Checkpoint folders of two teachers."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b")]
    for folder, seed in zip(folders, (5, 6), strict=True):
        tiny_model(seed).save_pretrained(folder)
        char_tokenizer().save_pretrained(folder)
    return str(folders[0]), str(folders[1])


@contextmanager
def teacher(kind: str, paths: tuple[str, str], cache: Path) -> Iterator[tuple[TeacherScorer, list[FakeVLLM]]]:
    """A teacher on one or two servers, which have forgotten the start-up check."""
    fakes = [FakeVLLM(tiny_model(seed)) for seed in (5, 6)][: 1 if kind in ("plain", "cached") else 2]
    with running(*fakes):
        parts: list[TeacherScorer] = [
            VLLMTeacher(urls=(fake.url,), path=path, backoff_s=0.01, timeout_s=30.0, retries=0)
            for fake, path in zip(fakes, paths, strict=False)
        ]
        if "cached" in kind:
            parts = [CachedTeacher(teacher=part, dir=str(cache / str(i))) for i, part in enumerate(parts)]
        named = dict(zip("ab", parts, strict=False))
        mixed = {"by row": {"route": "kind"}, "averaged": {"weights": {"a": 0.8, "b": 0.2}}}
        how = mixed.get(kind.partition(",")[0])
        part = parts[0] if how is None else MixtureTeacher(teachers=named, **how)
        part.setup(student_info())
        for fake in fakes:
            fake.forget()
        try:
            yield part, fakes
        finally:
            part.teardown()


def requests() -> list[SampleRequest]:
    rows = [{"kind": "ab"[i % 2]} for i in range(len(PROMPTS))]
    return sample_requests(PROMPTS, rows=rows, group_size=3, max_new_tokens=8)


class WaitsForTheTeacher(HFSampler):
    """Hands out its last group only once the servers have been asked about one before it."""

    fakes: Sequence[FakeVLLM] = ()
    waited = False

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        groups = list(super().sample(requests))
        yield from groups[:-1]
        pause = threading.Event()
        for _ in range(600):
            if any(fake.asked for fake in self.fakes):
                self.waited = True
                break
            pause.wait(0.1)
        yield groups[-1]


def same(ours: TeacherScores, theirs: TeacherScores) -> None:
    assert torch.equal(ours.valid, theirs.valid)
    for name in ("sampled", "topk"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_group_is_scored_before_the_last_is_sampled(
    kind: str, paths: tuple[str, str], tmp_path: Path
) -> None:
    sampler = WaitsForTheTeacher(group_size=3, max_new_tokens=8)
    divergence = K2() if kind == "averaged" else TopK(k=4)
    with teacher(kind, paths, tmp_path) as (part, fakes):
        assert part.elsewhere
        sampler.fakes = fakes
        parts = StepParts(sampler=sampler, teacher=part, divergence=divergence, beta=Constant(value=1.0))
        student = tiny_student()
        step = DistillationStep(parts, StepSettings(), student, student_info())
        sampler.setup(student_info())
        backend = LocalBackend(student, torch.optim.SGD(student.parameters(), lr=0.0))
        clock, context = PhaseClock(), step.context(0)
        rollouts = step.rollout(requests(), context, backend, clock)
        _, ours, _ = step.judge(rollouts, context, clock)
        assert sampler.waited, "nothing was asked before the last group was there"
        asked = [ids for fake in fakes for ids in fake.asked]
        times = 2 if kind == "averaged" else 1
        ends = [int(mask.nonzero()[-1]) + 1 for mask in rollouts.loss_mask]
        own = [tuple(ids[:end].tolist()) for ids, end in zip(rollouts.tokens, ends, strict=True)]
        once = Counter(set(own) if "cached" in kind else own)
        assert Counter(asked) == Counter({ids: times * count for ids, count in once.items()})
        step._early = {}
        _, theirs, _ = step.judge(rollouts, context, clock)
        assert ours is not None and theirs is not None and int(ours.valid.sum()) > 0
        same(ours, theirs)
        step.close()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_asked_for_from_many_threads_have_their_own_scores(
    kind: str, paths: tuple[str, str], tmp_path: Path
) -> None:
    student, sampler = tiny_student(), HFSampler(group_size=3, max_new_tokens=8)
    sampler.setup(student_info())
    sampler.sync(student)
    groups = sorted(sampler.sample(requests()), key=lambda group: -group.request.group_id)
    rollouts = RolloutBatch.from_groups(groups, student_info().pad_token_id)
    request = ScoreRequest(sampled=True, topk=0 if kind == "averaged" else 3)
    with teacher(kind, paths, tmp_path) as (part, _), ThreadPoolExecutor(6) as threads:
        early = EarlyScores(part, student_info())
        list(threads.map(lambda group: early.ask(group, request), groups))
        ours = early.collect(rollouts, request)
        early.close()
        assert ours is not None
        same(ours, part.score(rollouts, request))


def test_what_goes_wrong_early_is_raised_where_scores_are_collected(paths: tuple[str, str], tmp_path: Path) -> None:
    student, sampler = tiny_student(), HFSampler(group_size=3, max_new_tokens=8)
    sampler.setup(student_info())
    sampler.sync(student)
    groups = list(sampler.sample(requests()))
    rollouts = RolloutBatch.from_groups(groups, student_info().pad_token_id)
    with teacher("by row", paths, tmp_path) as (part, fakes):
        fakes[1].always = status(400, "no prompt log-probs here")
        early, request = EarlyScores(part, student_info()), ScoreRequest(sampled=True)
        for group in groups:
            early.ask(group, request)
        with pytest.raises(ScoringError, match="HTTP 400 no prompt log-probs here"):
            early.collect(rollouts, request)
        early.close()


def test_the_end_of_a_run_does_not_wait_for_servers_to_return(paths: tuple[str, str], tmp_path: Path) -> None:
    answer = threading.Event()
    student, sampler = tiny_student(), HFSampler(group_size=3, max_new_tokens=8)
    sampler.setup(student_info())
    sampler.sync(student)
    groups = list(sampler.sample(requests()))
    with teacher("plain", paths, tmp_path) as (part, fakes):
        fakes[0].always = waits(answer)
        early, request = EarlyScores(part, student_info()), ScoreRequest(sampled=True)
        early.ask(groups[0], request)
        early.close()  # while the request is unanswered
        assert not answer.is_set()
        answer.set()
