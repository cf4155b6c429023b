"""What the two vLLM samplers share: their limits, the config of their engine, a request's parameters, a rollout."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from distillkit.components import StudentInfo
from distillkit.errors import ConfigError, RolloutError, problem
from distillkit.types import Rollout, SampleRequest

if TYPE_CHECKING:
    from distillkit.scorer import StudentScorer

__all__ = ["EngineCompletion", "check_above_zero", "check_lengths", "engine_config", "parameters", "rollout"]


@dataclass(frozen=True, kw_only=True)
class EngineCompletion:
    """Token ids of one completion, the end token included, and their log-probs as the engine drew from them."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


def check_above_zero(values: Mapping[str, float | None]) -> None:
    """Refuse arguments of a sampler that are 0 or less; None is fine.

    Raises:
        ConfigError: one is.
    """
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(problem(f"model.sampler.{name}", got=value, expected="above 0, or null"))


def engine_config(student: StudentScorer) -> Any:
    """The student's Hugging Face config, for an engine whose vocabulary ends where the shared one does."""
    model: Any = student.model
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = student.vocab_limit
    return config


def check_lengths(requests: Sequence[SampleRequest], limit: int, source: str) -> None:
    """Refuse prompts that leave too few positions for their completion.

    Args:
        requests: prompts to sample for.
        limit: prompt and completion tokens of the engine's longest sequence.
        source: what decides the limit.

    Raises:
        RolloutError: one does not fit.
    """
    for request in requests:
        prompt, new = len(request.prompt_ids), request.settings.max_new_tokens
        if prompt + new > limit:
            raise RolloutError(
                problem(
                    f"model.sampler: group {request.group_id} does not fit the engine's sequences",
                    got=f"{prompt} prompt tokens + {new} new ones = {prompt + new}",
                    expected=f"at most {limit} ({source})",
                    hint="a smaller model.sampler.max_new_tokens, or drop prompts this long",
                )
            )


def parameters(request: SampleRequest, info: StudentInfo) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for one group."""
    settings = request.settings
    return {
        "n": settings.group_size,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_new_tokens,
        "seed": request.seed >> 1,  # room for the place in the group, which vLLM adds
        "stop_token_ids": list(info.eos_token_ids),
        "logprobs": 0,  # of the drawn token alone
        "detokenize": False,
        "ignore_eos": True,  # the end tokens are those of `stop_token_ids`
    }


def rollout(request: SampleRequest, completion: EngineCompletion, info: StudentInfo) -> Rollout:
    """One completion as a rollout, with its text."""
    ids = torch.tensor(completion.ids, dtype=torch.long)
    text = info.tokenizer.decode(ids[:-1] if completion.stopped else ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return Rollout(
        completion_ids=ids,
        behaviour_logprobs=torch.tensor(completion.logprobs, dtype=torch.float32),
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        policy_version=torch.full_like(ids, request.policy_version),
        finish_reason="stop" if completion.stopped else "length",
        text=text,
    )
