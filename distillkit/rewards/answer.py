"""A final answer compared with the reference as text or number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distillkit.components import RewardFn
from distillkit.errors import ConfigError, problem
from distillkit.rewards.extract import gold_answer, gold_cell, last_boxed, normal_form
from distillkit.types import RewardOutput, RewardStatus, RolloutBatch

__all__ = ["AnswerReward"]


class AnswerReward(RewardFn):
    r"""1 when the completion's final answer has the same normal form as the row's, else 0. No library, no processes.

    Where the answer stands: with `after`, behind its last occurrence (the whole completion where it does not occur);
    with `pattern`, the last match of the regular expression (its group `answer`, else its first group, else all of it);
    with neither, in the last `\boxed{...}`, else on the last line that is not empty. The normal form: `27` is `27.0`,
    `1,000` is `1000`, spaces, enclosing dollars and a final full stop do not count. An empty answer is `unparseable`,
    value 0.

    Args:
        answer: column with the reference.
        after: a marker, such as `####` or `>`.
        pattern: a regular expression; may not be given together with `after`.
        exact: compare the two texts as they are, stripped of outer white space.
        ignore_case: let `Paris` equal `paris`.
        weight: factor on this reward in the total.

    Raises:
        ConfigError: both `after` and `pattern`, an empty `after`, or a `pattern` that is not a regular expression.

    Example:
        >>> AnswerReward(after=">").extract("3+8>1")
        '1'
    """

    def __init__(
        self,
        *,
        answer: str = "answer",
        after: str | None = None,
        pattern: str | None = None,
        exact: bool = False,
        ignore_case: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        if (after is not None and pattern is not None) or after == "":
            raise ConfigError(
                problem(
                    "model.rewards: answer.after and answer.pattern",
                    got=f"after={after!r}, pattern={pattern!r}",
                    expected="after (a text that is not empty), pattern, or neither",
                )
            )
        try:
            self._regex = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                problem("model.rewards: answer.pattern", got=f"{pattern!r}: {error}", expected="a regular expression")
            ) from error
        self.answer = answer
        self.after = after
        self.pattern = pattern
        self.exact = exact
        self.ignore_case = ignore_case

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        """Return the rows that have no reference."""
        return [
            (i, f"{row[self.answer]!r:.80} is not an answer" if self.answer in row else f"no column {self.answer!r}")
            for i, row in enumerate(rows)
            if not self._normal(self._gold(row.get(self.answer)))
        ]

    def extract(self, text: str) -> str | None:
        """Return the final answer that `text` gives, None when it gives none."""
        if self.after is not None:
            found: str | None = text.rpartition(self.after)[2]
        elif self._regex is not None:
            group = "answer" if "answer" in self._regex.groupindex else min(self._regex.groups, 1)
            matches = list(self._regex.finditer(text))
            found = matches[-1][group] if matches else None
        elif r"\boxed" in text:
            found = last_boxed(text)
        else:
            found = text.rstrip().rpartition("\n")[2]
        return (found or "").strip() or None

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return 1 or 0 for each rollout; NaN for one whose row has no reference."""
        golds = [self._normal(self._gold(gold_cell(row, self.answer, "answer"))) for row in rollouts.rows]
        found = [self._normal(self.extract(text)) for text in rollouts.texts]
        correct = [bool(a) and a == gold if gold else None for gold, a in zip(golds, found, strict=True)]
        status: list[RewardStatus] = [
            "not_applicable" if not gold else "scored" if a else "unparseable"
            for gold, a in zip(golds, found, strict=True)
        ]
        return RewardOutput.single(
            "answer",
            [None if c is None else float(c) for c in correct],
            weight=self.weight,
            status=status,
            correct=correct,
            answers=[a or None for a in found],
        )

    def _gold(self, value: object) -> str | None:
        return value.strip() if self.exact and isinstance(value, str) else gold_answer(value)

    def _normal(self, answer: str | None) -> str:
        if answer is None:
            return ""
        form = answer if self.exact else normal_form(answer)
        return form.casefold() if self.ignore_case else form
