"""A reward for short answers: `few_words`."""

from __future__ import annotations

from distillkit.components import RewardFn
from distillkit.errors import ConfigError, problem
from distillkit.types import RewardOutput, RolloutBatch

__all__ = ["FewWords"]


class FewWords(RewardFn):
    """0 up to `limit` words, then −1 per `limit` words too many, at least −1.

    Args:
        limit: words that cost nothing.
        weight: factor on this reward in the total.

    Raises:
        ConfigError: `limit` below 1.

    Example:
        >>> FewWords(limit=2).value("one two three")
        -0.5
    """

    def __init__(self, *, limit: int = 100, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        if limit < 1:
            raise ConfigError(problem("reward few_words: limit", got=limit, expected="at least 1 word"))
        self.limit = limit

    def value(self, text: str) -> float:
        """Return the punishment of one completion, in [-1, 0]."""
        too_many = max(0, len(text.split()) - self.limit)
        return -min(1.0, too_many / self.limit)

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return the punishment of each rollout; it says nothing about correctness."""
        return RewardOutput.single("few_words", [self.value(text) for text in rollouts.texts], weight=self.weight)
