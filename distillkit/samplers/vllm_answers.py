"""Reads what a vLLM server answers to one group, and trusts none of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distillkit.samplers.vllm_requests import EngineCompletion

__all__ = ["BadAnswer", "read_completions"]


class BadAnswer(Exception):
    """An answer that is none to the request: other tokens, fewer, cut short, or drawn with other weights."""


def read_completions(answer: Any, body: Mapping[str, Any], *, version: str, vocab: int) -> list[EngineCompletion]:
    """Return the completions of one group in the order of their seeds.

    Args:
        answer: the JSON of `/inference/v1/generate`.
        body: the JSON that was sent.
        version: the weights that must have drawn every token.
        vocab: ids at or beyond it are no tokens of the student.

    Raises:
        BadAnswer: anything does not fit.
    """
    wanted = body["sampling_params"]
    try:
        if answer["prompt_token_ids"] != body["token_ids"]:
            raise BadAnswer(f"an answer to {len(answer['prompt_token_ids'])} other prompt tokens than were sent")
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != wanted["n"]:
            raise BadAnswer(f"{len(choices)} completions instead of {wanted['n']}")
        return [_completion(choice, wanted, version, vocab) for choice in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"no {error}" if isinstance(error, KeyError) else str(error)) from error


def _completion(choice: Mapping[str, Any], wanted: Mapping[str, Any], version: str, vocab: int) -> EngineCompletion:
    ids = tuple(int(token) for token in choice["token_ids"])
    if not 0 < len(ids) <= wanted["max_tokens"]:
        raise BadAnswer(f"{len(ids)} tokens of {wanted['max_tokens']}")
    scored = choice["logprobs"]["content"]
    logprobs = tuple(float(entry["logprob"]) for entry in scored)
    stopped = choice["finish_reason"] == "stop"
    ends = set(wanted["stop_token_ids"])
    versions = {span["version"] for span in choice["weight_versions"]}
    checks = (
        (all(0 <= token < vocab for token in ids), f"token ids from outside the {vocab} of the student"),
        ([entry["token_id"] for entry in scored] == list(ids), "log-probs of other tokens than were sampled"),
        (all(math.isfinite(value) and value <= 1e-3 for value in logprobs), "log-probs that are none"),
        (choice["finish_reason"] in ("stop", "length"), f"a completion that ended with {choice['finish_reason']!r}"),
        ((ids[-1] in ends) == stopped and not ends & set(ids[:-1]), "a completion that runs past its end token"),
        (stopped or len(ids) == wanted["max_tokens"], f"a completion cut at {len(ids)} tokens"),
        (versions == {version}, f"weights {sorted(versions)} instead of {version}: not this run's last"),
    )
    for holds, got in checks:
        if not holds:
            raise BadAnswer(got)
    return EngineCompletion(ids=ids, logprobs=logprobs, stopped=stopped)
