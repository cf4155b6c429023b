"""A sampler and a reward whose every number is known, for tests of what happens around them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from distillkit.components import RewardFn, RolloutSampler, StudentInfo
from distillkit.data import DataSource, EvalSet, PreparedPrompt
from distillkit.types import RewardOutput, Rollout, RolloutBatch, RolloutGroup, SampleRequest


class DigitSampler(RolloutSampler):
    """Answers with digits drawn from the request's seed alone; yields the groups in another order than asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.asked: list[SampleRequest] = []

    def sync(self, student: Any) -> None:
        pass

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[RolloutGroup]:
        self.asked += requests
        for request in reversed(requests):
            draws = random.Random(request.seed)
            texts = ["5" * draws.randint(1, 3) + str(draws.randint(0, 3)) for _ in range(request.settings.group_size)]
            yield RolloutGroup(request=request, rollouts=tuple(rollout(text) for text in texts))


class DigitReward(RewardFn):
    """The last digit is the answer: right if it is the gold; `3` hangs the verifier, `2` is no answer at all."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        values: list[float | None] = []
        correct: list[bool | None] = []
        status: list[Any] = []
        answers: list[str | None] = []
        for text, row in zip(rollouts.texts, rollouts.rows, strict=True):
            digit = text[-1]
            hung, none = digit == "3", digit == "2"
            right = digit == row["answer"]
            values.append(None if hung else float(right and not none))
            correct.append(None if hung else right and not none)
            status.append("timed_out" if hung else "unparseable" if none else "scored")
            answers.append(None if hung or none else digit)
        return RewardOutput.single("digit", values, status=status, correct=correct, answers=answers)


def rollout(text: str) -> Rollout:
    """A completion of one token per character, cut off when it is longer than three."""
    ids = torch.tensor([ord(character) for character in text])
    return Rollout(
        completion_ids=ids,
        behaviour_logprobs=torch.zeros(len(ids)),
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        policy_version=torch.zeros(len(ids), dtype=torch.long),
        finish_reason="length" if len(ids) > 3 else "stop",
        text=text,
    )


def problems(count: int) -> list[PreparedPrompt]:
    """Problems whose gold answers are 0, 1, 0, 1, …"""
    rows: list[Mapping[str, Any]] = [{"prompt": f"{i}?", "answer": str(i % 2)} for i in range(count)]
    return [PreparedPrompt(prompt_ids=(i, 7), prompt=f"{i}?", row=row, index=i) for i, row in enumerate(rows)]


def student_info() -> StudentInfo:
    """What evaluation needs of it: the padding id."""
    return StudentInfo(
        tokenizer=None,  # type: ignore[arg-type]
        vocab_limit=128,
        eos_token_ids=(1,),
        pad_token_id=0,
        device=torch.device("cpu"),
    )


def eval_set(**settings: Any) -> EvalSet:
    """Four sampled completions per problem, two problems a batch."""
    chosen = {"name": "five", "k": 4, "ks": [1, 2, 4], "temperature": 1.0, "problems_per_batch": 2, **settings}
    return EvalSet(source=DataSource(path="five.jsonl"), **chosen)
