"""Rewards: what a finished rollout is worth, and whether it is right.

`math_verify` a final answer compared as mathematics, in processes with a deadline · `answer` a final answer compared as
text or number · `knights_and_knaves` the role of every inhabitant · `format` the shape of the completion · `length`
DAPO's overlong punishment · `gsrm` the structure of the reasoning against a teacher's (RLKD; a folder of its own) ·
`function` a plain Python function in TRL's convention.

Helpers: `pool` worker processes with a deadline, a memory cap and no leftovers (`pool_process` and `pool_worker` are
the two ends of its pipes) · `extract` finding the final answer in a text, and its normal form · `math_answers`
comparing two answers, inside a worker.

To add one: subclass `distillkit.components.RewardFn` (keyword-only arguments, `weight` passed on), return
`RewardOutput.single(...)` from `__call__`, and register the class under the entry point group `distillkit.reward`. A
value that could not be computed is NaN with the status `timed_out`, `crashed` or `undecided`, never 0. For a few lines
of Python, write a function instead and give its dotted path in `model.rewards`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.rewards.function import as_reward

__all__ = ["as_reward"]


def __getattr__(name: str) -> Any:
    # Not a plain import: the verifier processes import this package and must not load torch.
    if name == "as_reward":
        from distillkit.rewards.function import as_reward

        return as_reward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
