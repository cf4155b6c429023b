"""What a language model is asked about two steps, and how its one word is read."""

from __future__ import annotations

import string

from distillkit.rewards.gsrm.decomposer import without_thinking
from distillkit.rewards.gsrm.judge import StepPair, normal_text

__all__ = ["NO", "YES", "plainly_equal", "question", "spellings", "verdict"]

YES, NO = "yes", "no"

_ASKED = {
    "meta": "Do they turn to the same sub-problem next, however they word it?",
    "question": "Do they ask for the same thing?",
    "answer": "Do they come to the same result?",
}
_NAMES = {"meta": "plan of the next step", "question": "sub-problem", "answer": "answer to the sub-problem"}


def question(pair: StepPair, yes: str = YES, no: str = NO) -> list[dict[str, str]]:
    """Return the chat messages that ask whether two parts of steps agree: one user message."""
    name = _NAMES[pair.kind]
    text = (
        f"Two solutions of one problem are compared, step by step.\n\nProblem:\n{pair.problem}\n\n"
        f"First solution, {name}:\n{pair.ours}\n\nSecond solution, {name}:\n{pair.theirs}\n\n"
        f"{_ASKED[pair.kind]} Answer with one word, {yes} or {no}."
    )
    return [{"role": "user", "content": text}]


def plainly_equal(pair: StepPair) -> bool:
    """Return whether no judge is needed: both texts are the same in normal form."""
    return normal_text(pair.ours) == normal_text(pair.theirs)


def verdict(reply: str, yes: str = YES, no: str = NO) -> bool | None:
    """Return what a reply says: the reply has to *be* the word, whatever its case and punctuation.

    A word that is only contained says nothing: "not", "know" and "nobody" are no "no".

    Example:
        >>> verdict("Yes."), verdict("**NO**"), verdict("I know, yes"), verdict("not")
        (True, False, None, None)
    """
    word = without_thinking(reply).strip().strip(string.punctuation + "…。！").strip().casefold()
    return {yes.casefold(): True, no.casefold(): False}.get(word)


def spellings(word: str) -> tuple[str, ...]:
    """Return the ways in which a model may write a one-word answer.

    Example:
        >>> spellings("yes")
        ('yes', 'Yes', 'YES')
    """
    return tuple(dict.fromkeys((word, word.capitalize(), word.upper())))
