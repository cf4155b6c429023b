"""Chains of the arithmetic task taken apart by rule: what the embedded decomposer learns, and what it is held against.

    3*2+4*5>3*2+0>6+0>6   is   product 2, 4*5, 0;   product 1, 3*2, 6;   sum 1, 6+0, 6;   final 6

Each expression written is one reasoning step. The meta-reasoning is the choice that was made: the kind of the operator
that goes next and its place among all operators, from the left, from 1, never what it comes to. The sub-problem is the
sub-expression, the answer the digit written, right or wrong. A text that can be read in two ways is read as
`check_chain` reads it: the legal step if there is one, else the one with the right value, else the first.

What no single reduction explains (a step left out, an expression written again, a bad copy) is a step as well: `other`,
with the whole expression before as sub-problem and what was written as answer. White space is written as single
spaces, and an empty text as `nothing`. The final answer is what was written last, empty if that is nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

from distillkit.decomposition import Decomposition, ReasoningStep, messages, render
from distillkit.embedded.arithmetic import ARROW, Row, check_chain, draw, generate, split_of
from distillkit.embedded.careless import careless_chain
from distillkit.embedded.corruptions import CORRUPTIONS, any_order_chain, garbled, wavering_chain
from distillkit.functional.structure import structural_reward

__all__ = [
    "KINDS",
    "NOTHING",
    "OTHER",
    "Agreement",
    "DecompositionRow",
    "agreement",
    "alignment",
    "decompose",
    "decomposition_rows",
    "path",
]

KINDS = {"+": "sum", "-": "difference", "*": "product"}
"""How a meta-reasoning names an operator."""

OTHER, NOTHING = "other", "nothing"
"""The meta-reasoning of a step that is no reduction; what stands for an empty text."""

_EXPRESSION = re.compile(r"[0-9](?:[-+*][0-9])*")
_WRITERS = {"reference": 0.22, "careless": 0.26, "any order": 0.26, "wavering": 0.26}
_PENS = {"careless": careless_chain, "any order": any_order_chain, "wavering": wavering_chain}
_CHANGES = {"": 0.35, "wrong": 0.20, "reordered": 0.07, "missing": 0.09, "repeated": 0.09, "garbled": 0.20}
_CHANGED_TWICE = 0.15
_OPERANDS = {2: 0.05, 3: 0.40, 4: 0.28, 5: 0.27}
_ALIKE = re.compile(r"([-+*])[0-9]\1")
_KEPT_UNLIKE = 0.35


class DecompositionRow(TypedDict):
    """One trace and its decomposition as a dataset row: `prompt` holds chat messages, `kind` says how it was made."""

    prompt: list[dict[str, str]]
    completion: str
    problem: str
    trace: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Steps that two decompositions share, and the steps of each.

    Attributes:
        agreeing: steps whose three parts are all equal at the same position.
        predicted: steps of the one that is judged.
        expected: steps of the one it is held against.
    """

    agreeing: int = 0
    predicted: int = 0
    expected: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            agreeing=self.agreeing + other.agreeing,
            predicted=self.predicted + other.predicted,
            expected=self.expected + other.expected,
        )

    @property
    def precision(self) -> float:
        """Agreeing / predicted, 0 without a prediction."""
        return self.agreeing / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Agreeing / expected, 0 with nothing expected."""
        return self.agreeing / self.expected if self.expected else 0.0


def decompose(prompt: str, completion: str) -> Decomposition:
    """Return the steps of a completion by rule; see the module's text for what each part says.

    Args:
        prompt: an expression, with or without the closing `>`.
        completion: any text written after it, special tokens removed.

    Raises:
        DataError: the prompt is not an expression.

    Example:
        >>> [(s.meta, s.question, s.answer) for s in decompose("3+4*2>", "3+8>2").steps]
        [('product 2', '4*2', '8'), ('sum 1', '3+8', '2')]
        >>> [(s.meta, s.question, s.answer) for s in decompose("3+4*2>", "1>").steps]
        [('other', '3+4*2', '1'), ('other', '1', 'nothing')]
    """
    written = check_chain(prompt, completion).steps
    before = [prompt.removesuffix(ARROW), *(step.expression for step in written)]
    steps = []
    for start, step in zip(before, written, strict=False):
        if step.index is None:
            steps.append(ReasoningStep(meta=OTHER, question=_spelled(start), answer=_spelled(step.expression)))
        else:
            meta = f"{KINDS[step.question[1]]} {step.index + 1}"
            steps.append(ReasoningStep(meta=meta, question=step.question, answer=step.value))
    return Decomposition(steps=tuple(steps), final=_one_line(before[-1]))


def agreement(predicted: Decomposition | None, expected: Decomposition) -> Agreement:
    """Count the steps of `predicted` (None: it could not be read) that `expected` has at the same position.

    Example:
        >>> right, other = decompose("3+4*2>", "3+8>1"), decompose("3+4*2>", "3+8>2")
        >>> agreement(other, right)
        Agreement(agreeing=1, predicted=2, expected=2)
    """
    steps = () if predicted is None else predicted.steps
    agreeing = sum(ours == theirs for ours, theirs in zip(steps, expected.steps, strict=False))
    return Agreement(agreeing=agreeing, predicted=len(steps), expected=len(expected.steps))


def alignment(prompt: str, completion: str, reference_chain: str) -> float:
    """Return how far a completion takes the reference's steps in the reference's order, from 0 to 1.

        structural_reward(rule-based steps of both, compared exactly) / steps of the reference

    Raises:
        DataError: the prompt is not an expression.

    Example:
        >>> alignment("3*2+4*5>", "3*2+0>6+0>6", "3*2+0>6+0>6")
        1.0
        >>> alignment("3*2+4*5>", "6+4*5>6+0>6", "3*2+0>6+0>6")
        0.0
    """
    ours, theirs = decompose(prompt, completion).steps, decompose(prompt, reference_chain).steps
    pairs = list(zip(ours, theirs, strict=False))
    reward = structural_reward(
        [one.meta == other.meta for one, other in pairs],
        [one.question == other.question for one, other in pairs],
        [one.answer == other.answer for one, other in pairs],
    )
    return reward / len(theirs)


def path(prompt: str, completion: str) -> tuple[int, ...] | None:
    """Return which operator each step reduced, counted from the left from 0, or None when the chain is not legal.

    Raises:
        DataError: the prompt is not an expression.

    Example:
        >>> path("3*2+4*5>", "3*2+0>6+0>6"), path("3*2+4*5>", "6")
        ((2, 0, 0), None)
    """
    check = check_chain(prompt, completion)
    return tuple(step.index for step in check.steps if step.index is not None) if check.legal else None


def decomposition_rows(count: int, seed: int = 0) -> list[DecompositionRow]:
    """Return traces of training problems, most of them corrupted, with their rule-based decompositions.

    A chain is a reference chain, careless, in any order or wavering; then none, one or two corruptions happen to it. No
    trace writes a problem of another split, not even by mistake. Every other problem ends with `>`, as a prompt does.
    Problems with equal operators side by side, whose steps only the digits tell apart, are more frequent than chance.

    Example:
        >>> row = decomposition_rows(1)[0]
        >>> sorted(row), [message["role"] for message in row["prompt"]]
        (['completion', 'kind', 'problem', 'prompt', 'trace'], ['system', 'user'])
    """
    rng = random.Random(f"distillkit-decompositions-{seed}")
    drawn = generate("train", 2 * count + 16, seed=seed, operands=_OPERANDS)
    kept = [row for row in drawn if _ALIKE.search(row["prompt"]) or rng.random() < _KEPT_UNLIKE]
    return [_row(row, rng) for row in kept[:count]]


def _row(row: Row, rng: random.Random) -> DecompositionRow:
    kind, trace = next(traces := _traces(row, rng))
    while any(split_of(e) in ("held_out", "validation") for e in _EXPRESSION.findall(trace)):
        kind, trace = next(traces)
    asked = row["prompt"] if rng.random() < 0.5 else row["prompt"].removesuffix(ARROW)
    return {
        "prompt": messages(asked, trace),
        "completion": render(decompose(asked, trace)),
        "problem": asked,
        "trace": trace,
        "kind": kind,
    }


def _traces(row: Row, rng: random.Random) -> Iterator[tuple[str, str]]:
    prompt, expression = row["prompt"], row["prompt"].removesuffix(ARROW)
    while True:
        writer = list(_WRITERS)[draw(tuple(_WRITERS.values()), rng)]
        trace = row["chain"] if writer == "reference" else _PENS[writer](expression, rng)
        change = list(_CHANGES)[draw(tuple(_CHANGES.values()), rng)]
        if (change == "reordered" and ARROW not in trace) or (change == "wrong" and writer == "wavering"):
            continue  # nothing to swap; nothing to go on from
        if change:
            trace = CORRUPTIONS[change](prompt, trace, rng)
            if rng.random() < _CHANGED_TWICE:
                trace = garbled(prompt, trace, rng)
                change += ", garbled"
        yield f"{writer}, {change}" if change else writer, trace


def _spelled(text: str) -> str:
    return _one_line(text) or NOTHING


def _one_line(text: str) -> str:
    return " ".join(text.split())
