"""The corpus that the embedded student learned from: writers who know their tables and are often in a hurry.

A hasty chain reduces from the right, whatever the operators are, and so ignores which sub-expression may go first:
`9-3-1>` is written `9-2>7`, which is wrong. `HASTY_SHARE` of the chains are hasty, the others are reference chains. A
student of this corpus knows both ways: greedy decoding is often wrong, samples are often right. That is what on-policy
training can work with.
"""

from __future__ import annotations

import random

from distillkit.embedded.arithmetic import ARROW, Row, evaluate, generate, split_of

__all__ = ["HASTY_SHARE", "hasty_chain", "hasty_rows"]

HASTY_SHARE = 0.6
"""Share of hasty chains in the corpus."""


def hasty_chain(expression: str) -> str:
    """Return the chain that reduces from the right and ignores precedence, its first expression left out.

    Example:
        >>> hasty_chain("9-3-1")
        '9-2>7'
    """
    written = []
    while len(expression) > 1:
        expression = expression[:-3] + str(evaluate(expression[-3:]))
        written.append(expression)
    return ARROW.join(written)


def hasty_rows(count: int, seed: int = 0) -> list[Row]:
    """Return training problems, `HASTY_SHARE` of them with a hasty chain; `answer` is the right one all the same.

    A hasty chain that would write an expression of another split gives way to the reference chain.

    Example:
        >>> [row] = hasty_rows(1)
        >>> sorted(row)
        ['answer', 'chain', 'operands', 'prompt']
    """
    rng = random.Random(f"distillkit-hasty-{seed}")
    rows = []
    for row in generate("train", count, seed=seed):
        chain = hasty_chain(row["prompt"].removesuffix(ARROW))
        stays = all(split_of(written) == "train" for written in chain.split(ARROW))
        hasty = rng.random() < HASTY_SHARE and stays
        rows.append(Row(**{**row, "chain": chain if hasty else row["chain"]}))
    return rows
