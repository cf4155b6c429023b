"""Step-by-step arithmetic modulo 10: a task that is learned in minutes and still branches.

A prompt is an expression of two to five one-digit operands and `>`; the completion rewrites it, one sub-expression a
step, until one digit is left:

    prompt 3*2+4*5>     completion 6+4*5>6+0>6     or     3*2+0>6+0>6

**Which sub-expression may go next.** One whose reduction leaves the value unchanged whatever the digits are: a product
anywhere; a sum or difference when no product is on either side of it and no minus is before it. So `1+2+3` may start
with either sum, `1-2+3` only with `1-2`, and `3*2+4*5` with either product.

**Reference chains choose.** Of the legal steps, counted from the left, each is half as likely as the one before it:
2/3, 1/3 for two, 4/7, 2/7, 1/7 for three.

**Splits.** A hash of the text sends 4 % of all expressions to `held_out` and 2 % to `validation`. An expression is in
`train` only if no order of reducing it, legal or not, ever writes one of those, so no chain of training shows a
held-out problem, not even half-way. Two operands are the digit tables: training only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, TypedDict, get_args

from distillkit.errors import ConfigError, DataError, problem

__all__ = [
    "ARROW",
    "HELD_OUT_COUNTS",
    "TRAIN_MIX",
    "VALIDATION_COUNTS",
    "ChainCheck",
    "Row",
    "Split",
    "Step",
    "check_chain",
    "draw",
    "evaluate",
    "generate",
    "held_out",
    "legal_steps",
    "right_steps",
    "sample_chain",
    "split_of",
    "step_probabilities",
    "validation",
]

Split = Literal["train", "validation", "held_out"]

TRAIN_MIX: Mapping[int, float] = MappingProxyType({2: 0.10, 3: 0.20, 4: 0.35, 5: 0.35})
"""Share of training problems by number of operands."""

HELD_OUT_COUNTS: Mapping[int, int] = MappingProxyType({3: 100, 4: 200, 5: 200})
"""The 500 held-out problems by number of operands."""

VALIDATION_COUNTS: Mapping[int, int] = MappingProxyType({3: 60, 4: 120, 5: 120})
"""The 300 validation problems, to choose settings on, by number of operands."""

ARROW = ">"
"""Closes a prompt and separates the expressions of a chain."""

_OPERATORS = "+-*"
_DIGITS = "0123456789"
_OPERANDS = (2, 3, 4, 5)
_HELD_OUT_PERCENT, _VALIDATION_PERCENT = 4, 2


class Row(TypedDict):
    """One problem as a dataset row."""

    prompt: str
    answer: str
    chain: str
    operands: int


@dataclass(frozen=True)
class Step:
    """One rewriting of an expression.

    Attributes:
        expression: what the step wrote.
        index: which operator of the expression before it went, counted from the left; None when no reduction of one
            sub-expression explains what was written.
        question: the sub-expression that went, such as `4*2`; empty when `index` is None.
        value: the digit written in its place; empty when `index` is None.
        allowed: whether that sub-expression might go next.
        right: whether `value` is its value.
    """

    expression: str
    index: int | None
    question: str
    value: str
    allowed: bool
    right: bool

    @property
    def legal(self) -> bool:
        """Whether the step keeps the value of the whole expression for a good reason."""
        return self.allowed and self.right


@dataclass(frozen=True)
class ChainCheck:
    """A completion taken apart into its steps.

    Attributes:
        steps: one `Step` per expression written, as far as they could be read.
        answer: the last thing written if it is one digit, else None.
        correct: whether `answer` is the value of the prompt.
        complete: whether the chain ends in one digit with one operand less at each step.
    """

    steps: tuple[Step, ...]
    answer: str | None
    correct: bool
    complete: bool

    @property
    def legal(self) -> bool:
        """Whether the chain is complete and each of its steps is legal; such a chain is always correct."""
        return self.complete and all(step.legal for step in self.steps)


def evaluate(expression: str) -> int:
    """Return the value of an expression, modulo 10.

    Example:
        >>> evaluate("3+4*2")
        1
    """
    _check_expression(expression)
    total, product, sign = 0, int(expression[0]), 1
    for operator, digit in zip(expression[1::2], expression[2::2], strict=True):
        if operator == "*":
            product *= int(digit)
        else:
            total, product, sign = total + sign * product, int(digit), 1 if operator == "+" else -1
    return (total + sign * product) % 10


def legal_steps(expression: str) -> tuple[Step, ...]:
    """Return every step that may come next, from the left; empty for one digit.

    Example:
        >>> [(step.question, step.expression) for step in legal_steps("3*2+4*5")]
        [('3*2', '6+4*5'), ('4*5', '3*2+0')]
        >>> [step.question for step in legal_steps("1-2+3*4")]
        ['1-2', '3*4']
    """
    _check_expression(expression)
    return _legal_steps(expression)


def step_probabilities(count: int) -> tuple[float, ...]:
    """Return how likely a reference chain takes each of `count` legal steps, from the left.

    Example:
        >>> step_probabilities(2)
        (0.6666666666666666, 0.3333333333333333)
    """
    total = 2**count - 1
    return tuple(2 ** (count - 1 - rank) / total for rank in range(count))


def sample_chain(expression: str, rng: random.Random) -> str:
    """Return one reference chain of the expression, its first expression left out.

    Example:
        >>> sample_chain("3+4*2", random.Random(0))
        '3+8>1'
    """
    _check_expression(expression)
    written = []
    while steps := _legal_steps(expression):
        expression = steps[draw(step_probabilities(len(steps)), rng)].expression
        written.append(expression)
    return ARROW.join(written)


def check_chain(prompt: str, completion: str) -> ChainCheck:
    """Take a completion apart: which sub-expression each step reduced, to what, and whether it might and was right.

    An answer can be right in an illegal chain. A step that can be read in two ways is taken as the legal one.

    Args:
        prompt: an expression, with or without the closing `>`.
        completion: text written after it, special tokens removed.

    Returns:
        The steps, the answer and the verdicts. Any completion is accepted; a prompt that is no expression is not.

    Raises:
        DataError: the prompt is not an expression.

    Example:
        >>> check = check_chain("3+4*2>", "3+8>2")
        >>> [(step.question, step.value, step.legal) for step in check.steps]
        [('4*2', '8', True), ('3+8', '2', False)]
        >>> check.answer, check.correct, check.legal
        ('2', False, False)
    """
    expression = prompt.removesuffix(ARROW)
    _check_expression(expression)
    written = completion.split(ARROW)
    steps = tuple(_explain(before, after) for before, after in pairwise([expression, *written]))
    answer = written[-1] if _is_digit(written[-1]) else None
    return ChainCheck(
        steps=steps,
        answer=answer,
        correct=answer == str(evaluate(expression)),
        complete=answer is not None and all(step.index is not None for step in steps),
    )


def split_of(expression: str) -> Split | None:
    """Return the split an expression belongs to, or None when a chain of it would show a problem of another split.

    Example:
        >>> split_of("3+4")
        'train'
    """
    _check_expression(expression)
    own = _bucket(expression)
    return own if _belongs(expression, own) else None


def generate(
    split: Split, count: int, seed: int = 0, operands: Mapping[int, float] | None = None, *, distinct: bool = False
) -> list[Row]:
    """Draw problems of one split, each with one reference chain.

    Args:
        split: `train`, `validation` or `held_out`.
        count: how many rows.
        seed: the same seed gives the same rows, on every machine.
        operands: share of the rows by number of operands; `TRAIN_MIX` by default, without two operands (the digit
            tables) outside training.
        distinct: draw no expression twice.

    Returns:
        Rows with the keys of `Row`.

    Raises:
        ConfigError: an unknown split, or operand counts that this split does not have.

    Example:
        >>> [row] = generate("train", 1, operands={3: 1.0})
        >>> sorted(row), row["operands"]
        (['answer', 'chain', 'operands', 'prompt'], 3)
    """
    mix = _check_mix(split, operands)
    rng = random.Random(f"distillkit-arithmetic-{split}-{seed}")
    stream = _expressions(split, mix, rng)
    return [_row(expression, rng) for expression in _take(stream, count, distinct=distinct)]


def held_out() -> list[Row]:
    """Return the 500 held-out problems, always the same, `HELD_OUT_COUNTS` of each size.

    Example:
        >>> len(held_out())
        500
    """
    return [row.copy() for row in _fixed("held_out")]


def validation() -> list[Row]:
    """Return the 300 validation problems, always the same, `VALIDATION_COUNTS` of each size.

    Example:
        >>> len(validation())
        300
    """
    return [row.copy() for row in _fixed("validation")]


@cache
def _fixed(split: Split) -> tuple[Row, ...]:
    counts = HELD_OUT_COUNTS if split == "held_out" else VALIDATION_COUNTS
    parts = (generate(split, count, operands={size: 1}, distinct=True) for size, count in counts.items())
    return tuple(row for part in parts for row in part)


def _row(expression: str, rng: random.Random) -> Row:
    return {
        "prompt": expression + ARROW,
        "answer": str(evaluate(expression)),
        "chain": sample_chain(expression, rng),
        "operands": len(expression[::2]),
    }


def _expressions(split: Split, mix: Mapping[int, float], rng: random.Random) -> Iterator[str]:
    sizes, weights = tuple(mix), tuple(mix.values())
    while True:
        size = sizes[draw(weights, rng)]
        expression = _draw_expression(size, rng)
        while not _belongs(expression, split):
            expression = _draw_expression(size, rng)
        yield expression


def _draw_expression(size: int, rng: random.Random) -> str:
    choices = (_OPERATORS if position % 2 else _DIGITS for position in range(2 * size - 1))
    return "".join(letters[int(rng.random() * len(letters))] for letters in choices)


def draw(weights: tuple[float, ...], rng: random.Random) -> int:
    """Return an index with probability in proportion to its weight."""
    threshold = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return len(weights) - 1


def _take(stream: Iterator[str], count: int, *, distinct: bool) -> Iterator[str]:
    seen: set[str] = set()
    while count > 0:
        expression = next(stream)
        if not (distinct and expression in seen):
            seen.add(expression)
            count -= 1
            yield expression


@cache
def _digit_value(question: str) -> str:
    return str(evaluate(question))


@lru_cache(maxsize=100_000)
def right_steps(expression: str) -> tuple[Step, ...]:
    """Return the right reduction of every sub-expression, from the left, whether it may go next or not."""
    operators = expression[1::2]
    return tuple(
        _reduction(expression, index, _digit_value(_question(expression, index)), allowed=_may_go(operators, index))
        for index in range(len(operators))
    )


@lru_cache(maxsize=100_000)
def _legal_steps(expression: str) -> tuple[Step, ...]:
    return tuple(step for step in right_steps(expression) if step.allowed)


def _may_go(operators: str, index: int) -> bool:
    if operators[index] == "*":
        return True
    return operators[:index][-1:] in ("", "+") and operators[index + 1 : index + 2] != "*"


def _question(expression: str, index: int) -> str:
    return expression[2 * index : 2 * index + 3]


def _reduction(expression: str, index: int, value: str, *, allowed: bool) -> Step:
    question = _question(expression, index)
    written = expression[: 2 * index] + value + expression[2 * index + 3 :]
    return Step(written, index, question, value, allowed=allowed, right=value == _digit_value(question))


def _explain(before: str, after: str) -> Step:
    if not (_is_expression(before) and _is_expression(after) and len(after) == len(before) - 2):
        return Step(after, None, "", "", allowed=False, right=False)
    readings = [
        _reduction(before, index, after[2 * index], allowed=_may_go(before[1::2], index))
        for index in range(len(before) // 2)
    ]
    fitting = [step for step in readings if step.expression == after]
    unexplained = Step(after, None, "", "", allowed=False, right=False)
    return max(fitting, key=lambda step: (step.legal, step.right, step.allowed), default=unexplained)


@lru_cache(maxsize=500_000)
def _bucket(expression: str) -> Split:
    if len(expression) < 5:
        return "train"
    digest = hashlib.blake2b(expression.encode(), digest_size=8, person=b"arithmetic").digest()
    percent = int.from_bytes(digest, "big") % 100
    if percent < _HELD_OUT_PERCENT:
        return "held_out"
    return "validation" if percent < _HELD_OUT_PERCENT + _VALIDATION_PERCENT else "train"


def _belongs(expression: str, split: Split) -> bool:
    return _bucket(expression) == split and (split != "train" or _reaches_only_train(expression))


@lru_cache(maxsize=500_000)
def _reaches_only_train(expression: str) -> bool:
    if len(expression) < 5:
        return True
    return _bucket(expression) == "train" and all(
        _reaches_only_train(step.expression) for step in right_steps(expression)
    )


def _is_digit(text: str) -> bool:
    return len(text) == 1 and text in _DIGITS


def _is_expression(text: str) -> bool:
    return (
        len(text) % 2 == 1
        and all(digit in _DIGITS for digit in text[::2])
        and all(operator in _OPERATORS for operator in text[1::2])
    )


def _check_expression(expression: str) -> None:
    if not _is_expression(expression):
        raise DataError(
            problem(
                "arithmetic: not an expression",
                got=repr(expression),
                expected="one-digit operands joined by + - *, without spaces, such as '3+4*2'",
            )
        )


def _check_mix(split: Split, operands: Mapping[int, float] | None) -> Mapping[int, float]:
    if split not in get_args(Split):
        known = ", ".join(get_args(Split))
        raise ConfigError(problem("arithmetic: unknown split", got=repr(split), expected=known))
    sizes = _OPERANDS if split == "train" else _OPERANDS[1:]
    mix = operands if operands is not None else {size: TRAIN_MIX[size] for size in sizes}
    if not mix or not set(mix) <= set(sizes) or min(mix.values()) < 0 or not sum(mix.values()):
        raise ConfigError(
            problem(f"arithmetic: operand counts of split {split}", got=dict(mix), expected=f"weights for {sizes}")
        )
    return mix
