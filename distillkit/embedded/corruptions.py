"""Chains of the arithmetic task made worse on purpose: what a decomposer has to take apart as it stands.

    wrong       one step writes a wrong digit, and the later steps go on from it
    reordered   two neighbouring expressions change places
    missing     one expression is left out
    repeated    one expression is written twice
    garbled     a character changed, dropped or added, the end cut off, or more written after it

Each takes a problem, a chain of it and a source of chance, and returns text; `CORRUPTIONS` names them. Two writers
write such chains from the start: `any_order_chain` and, like a model that is of two minds, `wavering_chain`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from distillkit.embedded.arithmetic import ARROW, check_chain, right_steps
from distillkit.errors import DataError, problem

__all__ = [
    "CORRUPTIONS",
    "Corruption",
    "any_order_chain",
    "garbled",
    "missing",
    "reordered",
    "repeated",
    "wavering_chain",
    "wrong",
]

Corruption = Callable[[str, str, random.Random], str]
"""(prompt, chain, rng) -> the corrupted chain."""

_DIGITS, _LETTERS = "0123456789", "0123456789+-*>"
_WAVERS = 0.4


def any_order_chain(expression: str, rng: random.Random) -> str:
    """Return a chain that works out any sub-expression next, each as likely as the others, its own value right.

    Example:
        >>> any_order_chain("3+4*2", random.Random(0))
        '3+8>1'
    """
    written = []
    while steps := right_steps(expression):
        expression = rng.choice(steps).expression
        written.append(expression)
    return ARROW.join(written)


def wavering_chain(expression: str, rng: random.Random) -> str:
    """Return a chain whose writer, at two steps of five, begins one reduction and ends with another.

    The later steps go on from what stands there. `3+8+6` may become `1+6`, `3+4`, `1+4` or `3+6`.

    Example:
        >>> wavering_chain("3+8+6", random.Random(4))
        '1+4>5'
    """
    written = []
    while steps := right_steps(expression):
        expression = rng.choice(steps).expression
        if rng.random() < _WAVERS:
            at = rng.randrange(len(expression))
            expression = expression[:at] + rng.choice(steps).expression[at:]
        written.append(expression)
    return ARROW.join(written)


def wrong(prompt: str, chain: str, rng: random.Random) -> str:
    """Return the chain with a wrong digit in one step; the later steps reduce the same operators, and rightly so.

    Raises:
        DataError: no step, or a step that no reduction explains.

    Example:
        >>> wrong("3+4*2>", "3+8>1", random.Random(1))
        '3+1>4'
    """
    steps = check_chain(prompt, chain).steps
    indices = [step.index for step in steps if step.index is not None]
    if len(indices) < len(steps):
        where = "arithmetic corruption wrong: cannot go on from this"
        raise DataError(problem(where, got=repr(chain), expected="a chain of single reductions"))
    spoiled = rng.randrange(len(indices))
    expression, written = prompt.removesuffix(ARROW), []
    for number, index in enumerate(indices):
        at = 2 * index
        digit = right_steps(expression)[index].value
        if number == spoiled:
            digit = rng.choice(_DIGITS.replace(digit, ""))
        expression = expression[:at] + digit + expression[at + 3 :]
        written.append(expression)
    return ARROW.join(written)


def reordered(prompt: str, chain: str, rng: random.Random) -> str:
    """Return the chain with two neighbouring expressions in the other order.

    Raises:
        DataError: fewer than two expressions.

    Example:
        >>> reordered("3+4*2>", "3+8>1", random.Random(0))
        '1>3+8'
    """
    written = chain.split(ARROW)
    if len(written) < 2:
        where = "arithmetic corruption reordered: nothing to swap"
        raise DataError(problem(where, got=repr(chain), expected="at least 2 expressions"))
    at = rng.randrange(len(written) - 1)
    return ARROW.join([*written[:at], written[at + 1], written[at], *written[at + 2 :]])


def missing(prompt: str, chain: str, rng: random.Random) -> str:
    """Return the chain without one of its expressions; nothing is left of a chain of one.

    Example:
        >>> missing("1+2+3+4>", "3+3+4>6+4>0", random.Random(0))
        '3+3+4>0'
    """
    written = chain.split(ARROW)
    del written[rng.randrange(len(written))]
    return ARROW.join(written)


def repeated(prompt: str, chain: str, rng: random.Random) -> str:
    """Return the chain with one of its expressions written twice.

    Example:
        >>> repeated("3+4*2>", "3+8>1", random.Random(0))
        '3+8>1>1'
    """
    written = chain.split(ARROW)
    at = rng.randrange(len(written))
    return ARROW.join([*written[: at + 1], *written[at:]])


def garbled(prompt: str, chain: str, rng: random.Random) -> str:
    """Return the chain as a model that is not sure of itself may write it: one or two slips of the pen.

    A slip replaces, drops or adds a character (of the task, rarely any printable one), cuts the end off, or writes on
    after the end.

    Example:
        >>> garbled("3+4*2>", "3+8>1", random.Random(10))
        '3+81'
    """
    for _ in range(rng.choice((1, 1, 2))):
        chain = _slip(prompt, chain, rng)
    return chain


def _slip(prompt: str, chain: str, rng: random.Random) -> str:
    kind, at = rng.randrange(5), rng.randrange(len(chain) + 1)
    letter = chr(rng.randrange(32, 127)) if rng.random() < 0.1 else rng.choice(_LETTERS)
    if kind == 0:
        return chain[:at] + letter + chain[at + 1 :]
    if kind == 1:
        return chain[:at] + chain[at + 1 :]
    if kind == 2:
        return chain[:at] + letter + chain[at:]
    if kind == 3:
        return chain[:at]
    tail = rng.choice([*chain.split(ARROW), prompt.removesuffix(ARROW), letter, ""])
    return chain + ARROW + tail


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {"wrong": wrong, "reordered": reordered, "missing": missing, "repeated": repeated, "garbled": garbled}
)
"""Name of each corruption -> the function that makes it."""
