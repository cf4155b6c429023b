"""Sequences longer than what a model says it was made for: allowed for rotary positions, and said at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.training.base import StudentModule

__all__ = ["beyond_positions", "longest_sequences"]


def longest_sequences(module: StudentModule, training: bool) -> dict[str, tuple[int, int]]:
    """Return, by where it is set, the most prompt tokens and new tokens of what the module will sample or is given."""
    data, sampler = module.prompt_data, module.sampler
    prompt = data.max_prompt_tokens or max((report.longest_prompt for report in data.reports), default=0)
    sampled = None if sampler is None else sampler.max_new_tokens
    found: dict[str, int | None] = {}
    if training and module.needs_completions:
        found["data.max_completion_tokens"] = data.max_completion_tokens
    elif training:
        found["model.sampler.max_new_tokens"] = sampled
    for eval_set in data.val if sampler is not None else ():
        own = eval_set.max_new_tokens
        found[f"data.val.{eval_set.name}.max_new_tokens" if own else "model.sampler.max_new_tokens"] = own or sampled
    return {where: (prompt, new) for where, new in found.items() if new is not None}


def beyond_positions(config: Any, sequences: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a line for the longest sequence, if it is longer than a rotary model's declared positions.

    A learned table of positions is another matter: there the sampler refuses what does not fit.

    Args:
        config: of the model.
        sequences: prompt and new tokens, by where they are set.

    Example:
        >>> from types import SimpleNamespace as Namespace
        >>> text = Namespace(rope_parameters={"rope_type": "default"}, max_position_embeddings=4096)
        >>> beyond_positions(Namespace(get_text_config=lambda: text), {"model.sampler.max_new_tokens": (1024, 3072)})
        []
    """
    text = config.get_text_config()
    rotary, declared = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not rotary or declared is None or not sequences:
        return []
    extended = (rotary.get("factor") or 1.0) * (rotary.get("original_max_position_embeddings") or 0)
    limit = max(int(declared), int(extended))
    where, (prompt, new) = max(sequences.items(), key=lambda item: sum(item[1]))
    if prompt + new <= limit:
        return []
    return [
        f"{where}: prompts of up to {prompt:,} tokens and {new:,} new ones are {prompt + new:,}, beyond the {limit:,} "
        "positions that the student declares (max_position_embeddings); what it writes there may be poor"
    ]
