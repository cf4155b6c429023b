"""The sampler suite must fail samplers broken on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from distillkit.components import RolloutSampler, StudentInfo
from distillkit.scorer import StudentScorer
from distillkit.testing import FakeSampler, check
from distillkit.types import Rollout, RolloutGroup, SampleRequest
from tests.testing.broken import finds


class Plain(RolloutSampler):
    """Draws one token at a time with a full forward each: slow, right, and varied by the broken ones."""

    def setup(self, student: StudentInfo) -> None:
        self._student = student

    def sync(self, student: StudentScorer) -> None:
        self._scorer = student

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        for request in requests:
            draw = self.generator(request)
            rollouts = [self._one(request, draw) for _ in range(request.settings.group_size)]
            yield RolloutGroup(request=request, rollouts=tuple(self.change(r, request) for r in rollouts))

    def generator(self, request: SampleRequest) -> torch.Generator:
        return torch.Generator().manual_seed(request.seed)

    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return rollout

    @torch.no_grad()
    def _one(self, request: SampleRequest, draw: torch.Generator) -> Rollout:
        ids, logprobs = list(request.prompt_ids), []
        while len(logprobs) < request.settings.max_new_tokens:
            logits = self._scorer.model(input_ids=torch.tensor([ids])).logits[0, -1] / request.settings.temperature
            own = logits.log_softmax(-1)
            ids.append(int(torch.multinomial(own.exp(), 1, generator=draw)))
            logprobs.append(float(own[ids[-1]]))
            if ids[-1] in self._student.eos_token_ids:
                break
        return made(ids[len(request.prompt_ids) :], logprobs, self._student.eos_token_ids, request.policy_version)


def made(ids: list[int], logprobs: list[float], ends: tuple[int, ...], version: int) -> Rollout:
    return Rollout(
        completion_ids=torch.tensor(ids),
        behaviour_logprobs=torch.tensor(logprobs),
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        policy_version=torch.full((len(ids),), version),
        finish_reason="stop" if ids[-1] in ends else "length",
        text="",
    )


class DropsAGroup(Plain):
    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        if len(requests) > 1:
            requests = requests[:-1]
        return super().sample(requests)


class DropsARollout(Plain):
    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        for group in super().sample(requests):
            yield replace(group, rollouts=group.rollouts[1:])


class IgnoresSeeds(Plain):
    def generator(self, request: SampleRequest) -> torch.Generator:
        return torch.Generator().manual_seed(0)


class OneStream(Plain):
    def setup(self, student: StudentInfo) -> None:
        super().setup(student)
        self._draw = torch.Generator().manual_seed(0)

    def generator(self, request: SampleRequest) -> torch.Generator:
        return self._draw


class WrongTemperature(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return replace(rollout, behaviour_logprobs=rollout.behaviour_logprobs / 2)


class ShiftedLogprobs(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return replace(rollout, behaviour_logprobs=rollout.behaviour_logprobs.roll(1) - 0.01)


class StaleVersion(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return replace(rollout, policy_version=rollout.policy_version - 1)


class AlwaysStops(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return replace(rollout, finish_reason="stop")


class CutsEarly(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return made(rollout.completion_ids[:2].tolist(), rollout.behaviour_logprobs[:2].tolist(), (), 3)


class TooLong(Plain):
    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        longer = [replace(r, settings=replace(r.settings, max_new_tokens=9)) for r in requests]
        for request, group in zip(requests, super().sample(longer), strict=True):
            yield replace(group, request=request)


class PastTheEnd(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return made([5, 1, 5, 5, 5, 5], [-1.0] * 6, (1,), 3)


class PaddedVocabulary(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        return made([*rollout.completion_ids[:-1].tolist(), 10_000], rollout.behaviour_logprobs.tolist(), (), 3)


class Empty(Plain):
    def change(self, rollout: Rollout, request: SampleRequest) -> Rollout:
        nothing = torch.zeros(0, dtype=torch.long)
        return Rollout(
            completion_ids=nothing,
            behaviour_logprobs=nothing.float(),
            loss_mask=nothing.bool(),
            policy_version=nothing,
            finish_reason="stop",
            text="",
        )


class MovesTheStudent(Plain):
    def sync(self, student: StudentScorer) -> None:
        super().sync(student)
        with torch.no_grad():
            next(student.parameters()).add_(0.1)


class AnotherRequest(Plain):
    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        for group in super().sample(requests):
            yield replace(group, request=replace(group.request, row={}))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (DropsAGroup(), "gives the groups [6, 11], not [1, 6, 11]"),
        (DropsARollout(), "gives 3 rollouts for a group of 4"),
        (IgnoresSeeds(), "the seeds of the requests change nothing"),
        (OneStream(), "a group's draws depend on the other requests of the call, or on earlier calls"),
        (WrongTemperature(), "behaviour log-probs are not the student's at the sampling temperature"),
        (ShiftedLogprobs(), "behaviour log-probs are not the student's at the sampling temperature"),
        (StaleVersion(), "policy_version is not the request's"),
        (AlwaysStops(), "finish_reason 'stop' and the end token do not agree"),
        (CutsEarly(), "finish_reason is 'length' before max_new_tokens"),
        (TooLong(), "a completion is longer than max_new_tokens"),
        (PastTheEnd(), "a completion goes on after its end token"),
        (PaddedVocabulary(), "an id is at or beyond vocab_limit"),
        (Empty(), "a completion has no token at all"),
        (MovesTheStudent(), "changes the student's weights"),
        (AnotherRequest(), "a group holds another request than it was asked for"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, RolloutSampler) else "",
)
def test_broken_samplers_are_found(part: RolloutSampler, text: str) -> None:
    finds(part, text)


def test_sound_samplers_pass() -> None:
    check(Plain())
    check(FakeSampler())


def test_a_recording_needs_no_seeds_and_no_versions() -> None:
    class Recording(FakeSampler):
        """Says the same whatever the seed.

        Args:
            completions: what it says.
        """

        def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
            for request, group in zip(requests, super().sample([replace(r, seed=0) for r in requests]), strict=True):
                yield replace(group, request=request)

    check(Recording(), draws=False)
    finds(Recording(), "the seeds of the requests change nothing")
