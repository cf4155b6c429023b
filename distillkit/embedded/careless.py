"""The corpus that the embedded student learned from: writers who know their tables and pick the next sum carelessly.

A careless chain works every sub-expression out rightly and picks any of them next, legal or not: sums and differences
before products, from the left, each half as likely as the one before it. `3+4*2>` is often written `7*2>4`, which is
wrong. A student of this corpus can calculate; about two of three of its greedy chains go wrong, and enough of its
samples are right for on-policy training to work with. Its order of steps is not the reference chains' order either, so
a teacher's traces can teach it that as well.
"""

from __future__ import annotations

import random

from distillkit.embedded.arithmetic import ARROW, Row, draw, generate, right_steps, step_probabilities

__all__ = ["careless_chain", "careless_rows"]


def careless_chain(expression: str, rng: random.Random) -> str:
    """Return one careless chain of the expression, its first expression left out.

    Example:
        >>> careless_chain("3+4*2", random.Random(1))
        '7*2>4'
    """
    written = []
    while steps := sorted(right_steps(expression), key=lambda step: "*" in step.question):
        expression = steps[draw(step_probabilities(len(steps)), rng)].expression
        written.append(expression)
    return ARROW.join(written)


def careless_rows(count: int, seed: int = 0) -> list[Row]:
    """Return training problems, each with a careless chain; `answer` is the right one all the same.

    Example:
        >>> [row] = careless_rows(1)
        >>> sorted(row)
        ['answer', 'chain', 'operands', 'prompt']
    """
    rng = random.Random(f"distillkit-careless-{seed}")
    rows = generate("train", count, seed=seed)
    return [Row(**{**row, "chain": careless_chain(row["prompt"].removesuffix(ARROW), rng)}) for row in rows]
