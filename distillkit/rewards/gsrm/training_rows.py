"""From decomposed traces to what a decomposer learns from, and the problem's text in a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, TypedDict

from distillkit.decomposition import Decomposition, messages, render
from distillkit.types import Prompt

__all__ = ["TrainingRow", "item_id", "problem_text", "thoughts", "training_rows"]


class TrainingRow(TypedDict):
    """One row of a decomposer's training set: what `SupervisedModule` reads, and the item's digest."""

    prompt: list[dict[str, str]]
    completion: str
    id: str


def training_rows(decomposed: Iterable[tuple[str, str, Decomposition]]) -> list[TrainingRow]:
    r"""Return one row per (problem, trace, decomposition): the prompt is what a decomposer is asked at inference.

    Raises:
        DecompositionError: a decomposition without steps, or with an empty part.

    Example:
        >>> from distillkit.decomposition import ReasoningStep
        >>> step = ReasoningStep(meta="the product first", question="4*2", answer="8")
        >>> [row] = training_rows([("3+4*2>", "3+8>1", Decomposition(steps=(step,), final="1"))])
        >>> row["completion"].splitlines()[1]
        'Meta-reasoning: the product first'
        >>> row["prompt"][-1]["content"]
        'Problem:\n3+4*2>\n\nReasoning:\n3+8>1'
    """
    return [
        TrainingRow(prompt=messages(text, trace), completion=render(decomposition), id=item_id(text, trace))
        for text, trace, decomposition in decomposed
    ]


def item_id(problem: str, trace: str) -> str:
    """Return a digest of a problem and a trace."""
    return hashlib.sha256(json.dumps([problem, trace]).encode()).hexdigest()[:32]


def problem_text(prompt: Prompt) -> str:
    """Return the problem in a prompt: text as it is, of messages what the user wrote.

    Example:
        >>> problem_text([{"role": "system", "content": "Reason."}, {"role": "user", "content": "1+1?"}])
        '1+1?'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(_content(m.get("content")) for m in prompt if m.get("role") == "user")


def thoughts(text: str, think_end: str | None) -> str:
    """Return what stands before the closing think tag (everything where there is none), without an opening tag.

    Example:
        >>> thoughts("<think>1+1=2</think> 2", "</think>"), thoughts("1+1=2", "</think>"), thoughts("a b", None)
        ('1+1=2', '1+1=2', 'a b')
    """
    if think_end is None:
        return text.strip()
    before = text.partition(think_end)[0].strip()
    opening = think_end.replace("</", "<", 1) if think_end.startswith("</") else None
    return before.removeprefix(opening).strip() if opening else before


def _content(content: Any) -> str:
    """The text of a message, whose content may be a list of typed parts."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
