"""The grammar of a reasoning trace taken apart: what a decomposer is asked for, trained on, and read by.

    Step 1
    Meta-reasoning: which sub-problem comes next, and why
    Sub-problem: what is asked there
    Answer: what was found
    Step 2
    ...
    Final answer: what the trace ends with

One table of labels makes the instruction (`instructions`, `messages`), the training target (`render`) and the parser
(`parse`), so they cannot drift apart: a parser that looks for other labels than the model was trained to write would
find nothing, and reward nothing, without ever failing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distillkit.errors import DistillkitError, problem

__all__ = [
    "ANSWER",
    "FINAL",
    "META",
    "QUESTION",
    "STEP",
    "Decomposition",
    "DecompositionError",
    "ReasoningStep",
    "instructions",
    "messages",
    "parse",
    "render",
]

STEP, META, QUESTION, ANSWER, FINAL = "Step", "Meta-reasoning:", "Sub-problem:", "Answer:", "Final answer:"
"""What a line of a decomposition starts with."""

_LINE = re.compile(rf"(?:{STEP} (?P<number>\d+)$)|(?P<label>{META}|{QUESTION}|{ANSWER}|{FINAL})(?: |$)(?P<text>.*)$")
_MEANING = {
    META: "which sub-problem the reasoning turns to now, and why, without its answer",
    QUESTION: "the sub-problem itself",
    ANSWER: "what the reasoning finds for it, right or wrong",
}


class DecompositionError(DistillkitError, ValueError):
    """A text that is not a decomposition: its trace cannot be scored."""


@dataclass(frozen=True, kw_only=True)
class ReasoningStep:
    """One reasoning step: what to tackle next, the sub-problem, its answer. Text without line breaks."""

    meta: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A trace as numbered reasoning steps and a final answer (empty when the trace gives none)."""

    steps: tuple[ReasoningStep, ...]
    final: str = ""


def render(decomposition: Decomposition) -> str:
    """Return the text of a decomposition: what a decomposer is trained to write; white space becomes single spaces.

    Raises:
        DecompositionError: there are no steps, or a part of a step is empty.

    Example:
        >>> step = ReasoningStep(meta="products first", question="4*2", answer="8")
        >>> print(render(Decomposition(steps=(step,), final="8")))
        Step 1
        Meta-reasoning: products first
        Sub-problem: 4*2
        Answer: 8
        Final answer: 8
    """
    if not decomposition.steps:
        raise DecompositionError(problem("decomposition: no steps", got="0 steps", expected="at least 1"))
    lines = []
    for number, step in enumerate(decomposition.steps, start=1):
        parts = {META: step.meta, QUESTION: step.question, ANSWER: step.answer}
        for label, text in parts.items():
            if not text.strip():
                where = f"decomposition: step {number}, {label.removesuffix(':')} is empty"
                raise DecompositionError(problem(where, got=repr(text), expected="text"))
        lines += [f"{STEP} {number}", *(f"{label} {_one_line(text)}" for label, text in parts.items())]
    return "\n".join([*lines, f"{FINAL} {_one_line(decomposition.final)}".rstrip()])


def parse(text: str) -> Decomposition:
    r"""Return the decomposition that a text spells, block by block; a value may run over several lines, blank ones too.

    Raises:
        DecompositionError: blocks not numbered 1, 2, 3 …, a label missing, repeated or out of order, an empty value, or
            no final answer line (a text cut short).

    Example:
        >>> parse("Step 1\nMeta-reasoning: m\nSub-problem: q\nAnswer: a\nFinal answer: a").steps[0].question
        'q'
    """
    found: list[tuple[str, list[str]]] = []
    for line in text.strip().splitlines():
        match = _LINE.match(line.strip())
        if not line.strip():
            continue
        if match is None:
            if not found or found[-1][0] == STEP:
                _refuse("text outside a block", line.strip())
            found[-1][1].append(line)
        elif match["number"]:
            found.append((STEP, [match["number"]]))
        else:
            found.append((match["label"], [match["text"]]))
    labels = [label for label, _ in found]
    count = labels.count(STEP)
    expected = [STEP, META, QUESTION, ANSWER] * count + [FINAL]
    if count == 0 or labels != expected:
        shown = next(
            (f"{i + 1}: {a!r} for {b!r}" for i, (a, b) in enumerate(zip(labels, expected, strict=False)) if a != b),
            None,
        )
        _refuse("labels missing, repeated or out of order", shown or f"{count} steps, {len(labels)} labels")
    values = [_one_line(" ".join(lines)) for _, lines in found]
    steps = []
    for i in range(count):
        number, meta, question, answer = values[4 * i : 4 * i + 4]
        if number != str(i + 1):
            _refuse(f"block {i + 1} has another number", number)
        if not (meta and question and answer):
            _refuse(f"step {i + 1} has an empty part", [meta, question, answer])
        steps.append(ReasoningStep(meta=meta, question=question, answer=answer))
    return Decomposition(steps=tuple(steps), final=values[-1])


def instructions() -> str:
    """Return what a decomposer is told: the grammar in words."""
    block = "\n".join(f"{label} {meaning}" for label, meaning in _MEANING.items())
    return (
        "Take the reasoning apart into its steps, in the order in which it was written. Keep wrong steps as they are, "
        "add nothing and leave nothing out. Write every step as\n\n"
        f"{STEP} <number, from 1>\n{block}\n\nand, after the last step, one line\n\n"
        f"{FINAL} <what the reasoning ends with>\n\nWrite nothing else."
    )


def messages(problem_text: str, trace: str) -> list[dict[str, str]]:
    """Return the chat messages that ask for a decomposition: in training, at inference and for labelling alike.

    Args:
        problem_text: the problem that the trace works on.
        trace: the reasoning.
    """
    asked = f"Problem:\n{problem_text}\n\nReasoning:\n{trace}"
    return [{"role": "system", "content": instructions()}, {"role": "user", "content": asked}]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _refuse(why: str, got: str | Sequence[str]) -> None:
    expected = f"{STEP} 1 / {META} … / {QUESTION} … / {ANSWER} … / … / {FINAL} …"
    raise DecompositionError(problem(f"decomposition: {why}", got=repr(got), expected=expected))
