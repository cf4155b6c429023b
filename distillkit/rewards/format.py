"""The shape that a completion should have."""

from __future__ import annotations

import re

from distillkit.components import RewardFn
from distillkit.errors import ConfigError, problem
from distillkit.types import RewardOutput, RolloutBatch

__all__ = ["THINK_THEN_ANSWER", "FormatReward"]

THINK_THEN_ANSWER = r"\s*<think>(?:(?!</?think>).)*</think>\s*(?=\S)(?:(?!</?think>).)*"
"""One `<think>...</think>` at the start and something after it, without a second one."""


class FormatReward(RewardFn):
    """1 when the whole completion matches a regular expression, else 0. It says nothing about correctness.

    Args:
        pattern: regular expression that the completion must match from end to end; the dot matches line ends. Where the
            chat template already opens `<think>`, leave it out of the pattern. Nested repetitions such as `(a+)+` can
            take for ever: there is no deadline here.
        weight: factor on this reward in the total.

    Raises:
        ConfigError: `pattern` is not a regular expression.

    Example:
        >>> reward = FormatReward()
        >>> [reward.matches(t) for t in ("<think>2+2</think> 4", "4", "<think>2+2</think>")]
        [True, False, False]
    """

    def __init__(self, *, pattern: str = THINK_THEN_ANSWER, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        try:
            self._regex = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(
                problem("model.rewards: format.pattern", got=f"{pattern!r}: {error}", expected="a regular expression")
            ) from error
        self.pattern = pattern

    def matches(self, text: str) -> bool:
        """Return whether the whole of `text` matches."""
        return self._regex.fullmatch(text) is not None

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return 1 or 0 for each rollout."""
        return RewardOutput.single("format", [float(self.matches(t)) for t in rollouts.texts], weight=self.weight)
