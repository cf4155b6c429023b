r"""Two answers compared as mathematics, with the math-verify library. Runs inside a worker of `VerifierPool`.

math-verify's own deadlines are signals, which only work in a main thread and cannot stop C code: they are off here, and
the pool's deadline takes their place.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

from distillkit.rewards.extract import clean, normal_form

__all__ = ["WARM_UP", "Verdict", "judge"]

Verdict = Literal["correct", "wrong", "unparseable", "bad_gold", "gold"]

WARM_UP = {"gold": r"x \in [0, \frac{1}{2})", "answer": r"[0, \frac{\sqrt{4}}{4})"}
"""An item that imports all that the comparison needs."""

_WORD = re.compile(r"[A-Za-z]{2,}")
_LONG_WORD = re.compile(r"[A-Za-z]{4,}")
_BASE = re.compile(r"[0-9A-F]_\{?([0-9]+)\}?$")


def judge(item: Mapping[str, Any]) -> Verdict:
    r"""Return how `item["answer"]` compares with `item["gold"]`.

    `bad_gold`: the gold is not an expression, whatever the answer is. `gold`: it is, and no answer was given to compare
    (the key `answer` is missing). `unparseable`: the answer is None or not an expression. Else `correct` or `wrong`.

    Beyond math-verify: answers in one normal form are equal; words are compared as words (`\text{east}` is not
    `\text{seat}`); numerals in two different bases are not equal.

    Example:
        >>> judge({"gold": r"\frac12", "answer": "0.5"}), judge({"gold": r"\frac12", "answer": "0.51"})
        ('correct', 'wrong')
    """
    gold, answer = str(item["gold"]), item.get("answer", "")
    gold_expressions = _expressions(gold)
    if not gold_expressions:
        return "bad_gold"
    if "answer" not in item:
        return "gold"
    if answer is None:
        return "unparseable"
    ours, theirs = normal_form(answer), normal_form(gold)
    if ours == theirs:
        return "correct"
    if _WORD.fullmatch(ours) and (_LONG_WORD.fullmatch(theirs) or (r"\text" in gold and _WORD.fullmatch(theirs))):
        return "correct" if ours.casefold() == theirs.casefold() else "wrong"
    bases = _BASE.search(ours), _BASE.search(theirs)
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return "wrong"
    expressions = _expressions(answer)
    if not expressions:
        return "unparseable"
    from math_verify import verify

    return "correct" if verify(list(gold_expressions), list(expressions), timeout_seconds=0) else "wrong"


@functools.lru_cache(maxsize=256)
def _expressions(answer: str) -> tuple[Any, ...]:
    """Return the SymPy expressions that math-verify reads in `answer`; empty when it reads none."""
    from math_verify import LatexExtractionConfig, parse

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = parse(
        rf"\boxed{{{clean(answer)}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )
    return tuple(found)
