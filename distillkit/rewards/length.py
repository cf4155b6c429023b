"""A punishment for completions that come near the length limit."""

from __future__ import annotations

from distillkit.components import RewardFn
from distillkit.errors import ConfigError, problem
from distillkit.types import RewardOutput, RolloutBatch

__all__ = ["LengthReward"]


class LengthReward(RewardFn):
    r"""DAPO's soft overlong punishment, in [-1, 0].

    With `L` completion tokens, limit `M = max_length` and margin `B = buffer`::

        0                  L <= M - B
        (M - B - L) / B    M - B < L <= M
        -1                 M < L

    See *DAPO: An Open-Source LLM Reinforcement Learning System at Scale*, Yu et al., 2025,
    https://arxiv.org/abs/2503.14476 (eq. 13; there M = 20,480 and B = 4,096).

    Args:
        max_length: M, tokens; None is the sampler's `max_new_tokens`.
        buffer: B, tokens; None is a fifth of M, the paper's ratio.
        weight: factor on this reward in the total.

    Raises:
        ConfigError: `max_length` below 1, or `buffer` not between 1 and `max_length`.

    Example:
        >>> [LengthReward(max_length=100, buffer=20).value(n) for n in (80, 90, 100, 101)]
        [0.0, -0.5, -1.0, -1.0]
    """

    def __init__(self, *, max_length: int | None = None, buffer: int | None = None, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        if max_length is not None and max_length < 1:
            raise ConfigError(problem("model.rewards: length.max_length", got=max_length, expected="at least 1 token"))
        if buffer is not None and not 1 <= buffer <= (max_length or buffer):
            raise ConfigError(
                problem("model.rewards: length.buffer", got=buffer, expected=f"1 to max_length ({max_length}) tokens")
            )
        self.max_length = max_length
        self.buffer = buffer

    def value(self, length: int, max_new_tokens: int | None = None) -> float:
        """Return the punishment of a completion of `length` tokens."""
        limit = self.max_length or max_new_tokens
        if limit is None:
            raise ConfigError(problem("model.rewards: length.max_length", got=None, expected="a number of tokens"))
        margin = min(self.buffer or max(1, limit // 5), limit)
        return -1.0 if length > limit else min(0.0, (limit - margin - length) / margin)

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return the punishment of each rollout; it says nothing about correctness."""
        limit = rollouts.settings.max_new_tokens
        values = [self.value(length, limit) for length in rollouts.completion_lengths.tolist()]
        return RewardOutput.single("length", values, weight=self.weight)
