"""One step of two groups of two rollouts, small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distillkit.embedded.tokenizer import build_tokenizer
from distillkit.types import (
    RewardOutput,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    SampleRequest,
    SamplingSettings,
    StepOutput,
)

NAN = float("nan")


@dataclass(frozen=True)
class Step:
    """A `StepOutput`, the tokenizer that made it, and a way to get its per-token values by hand."""

    output: StepOutput
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def make_batch(tokenizer: PreTrainedTokenizerFast) -> Callable[..., RolloutBatch]:
    """(prompt, completions) pairs -> a batch; a completion without `<eos>` was cut off."""

    def make(*groups: tuple[str, list[str]], rows: list[dict[str, object]] | None = None) -> RolloutBatch:
        made = []
        for number, (prompt, completions) in enumerate(groups):
            request = SampleRequest(
                prompt_ids=tuple(tokenizer(prompt)["input_ids"]),
                prompt=prompt,
                row={"answer": "7"} if rows is None else rows[number],
                group_id=10 + number,
                seed=0,
                settings=SamplingSettings(group_size=len(completions), max_new_tokens=8),
            )
            rollouts = []
            for text in completions:
                ids = torch.tensor(tokenizer(text)["input_ids"])
                stop = text.endswith("<eos>")
                rollouts.append(
                    Rollout(
                        completion_ids=ids,
                        behaviour_logprobs=-0.25 * torch.arange(1, len(ids) + 1, dtype=torch.float32),
                        loss_mask=torch.ones(len(ids), dtype=torch.bool),
                        policy_version=torch.zeros(len(ids), dtype=torch.long),
                        finish_reason="stop" if stop else "length",
                        text=text.removesuffix("<eos>"),
                    )
                )
            made.append(RolloutGroup(request=request, rollouts=tuple(rollouts)))
        return RolloutBatch.from_groups(made, pad_id=tokenizer.pad_token_id)

    return make


@pytest.fixture
def step(make_batch: Callable[..., RolloutBatch], tokenizer: PreTrainedTokenizerFast) -> Step:
    """Group 10: `7<eos>` right, `12` wrong and cut off; group 11: `5<eos>` wrong, `7<eos>` crashed the verifier."""
    batch = make_batch(("3+4>", ["7<eos>", "12"]), ("2+5>", ["5<eos>", "7<eos>"]))
    n, length = batch.tokens.shape
    assert (n, length) == (4, 6)

    def grid(*completions: list[float]) -> Tensor:
        values = torch.zeros(n, length)
        for row, completion in enumerate(completions):
            values[row, 4 : 4 + len(completion)] = torch.tensor(completion)
        return values

    rewards = RewardOutput(
        names=("answer", "format"),
        values=torch.tensor([[1.0, 0.5], [0.0, NAN], [0.0, 0.5], [NAN, 0.5]]),
        weights=(1.0, 0.1),
        status=(("scored", "scored", "unparseable", "crashed"), ("scored", "not_applicable", "scored", "scored")),
        correct=torch.tensor([1, 0, 0, -1], dtype=torch.int8),
        answers=("7", "12", None, None),
    )
    output = StepOutput(
        rollouts=batch,
        rewards=rewards,
        metrics={"train/reward": 0.5},
        per_token={
            "student_logprobs": grid([-0.1, -0.2], [-0.5, -1.0], [-0.25, -0.5], [NAN, NAN]),
            "teacher_logprobs": grid([-0.05, -0.1], [-4.5, -1.75], [-3.25, 0.0], [-0.5, -float("inf")]),
            "divergence": grid([0.00125, 0.005], [8.0, 0.28125], [4.5, 0.125], [NAN, NAN]),
            "distil_weight": grid([1, 1], [1, 0], [1, 1], [0, 0]),
            "advantages": grid([1, 1], [-1, -1], [0.5, -1.5], [0, 0]),
        },
    )
    return Step(output=output, tokenizer=tokenizer)
