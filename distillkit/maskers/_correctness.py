"""What maskers that ask "was it right?" share."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from distillkit.errors import ConfigError, problem
from distillkit.types import UNKNOWN, RewardOutput, RolloutBatch, TokenWeights

__all__ = ["UnknownRule", "check_unknown", "correctness", "distil_only"]

UnknownRule = Literal["keep", "drop"]

_HINT = "add one of math_verify, answer, knights_and_knaves to model.rewards, or set model.masker: null"


def check_unknown(unknown: UnknownRule) -> UnknownRule:
    """Return `unknown`, refused when it is neither `keep` nor `drop`."""
    if unknown not in get_args(UnknownRule):
        raise ConfigError(problem("model.masker.unknown", got=unknown, expected="keep or drop"))
    return unknown


def correctness(masker: str, rewards: RewardOutput | None) -> Tensor:
    """Return `rewards.correct` [N].

    Raises:
        ConfigError: there are no rewards; or each reward valued a rollout and none said whether it was right. (A batch
        in
            which a reward that can tell merely failed, or did not apply, passes: its rollouts are unknown.)
    """
    where = f"model.masker: {masker} must know which responses are correct"
    if rewards is None:
        raise ConfigError(problem(where, got="no rewards", expected="a reward that checks the answer", hint=_HINT))
    valued = all(any(status in ("scored", "unparseable") for status in column) for column in rewards.status)
    if len(rewards.correct) and valued and bool((rewards.correct == UNKNOWN).all()):
        got = f"{', '.join(rewards.names)}: correctness unknown for all {len(rewards.correct)} responses"
        raise ConfigError(problem(where, got=got, expected="a reward that checks the answer", hint=_HINT))
    return rewards.correct


def distil_only(rollouts: RolloutBatch, chosen: Tensor) -> TokenWeights:
    """Return policy weight 1 everywhere and distillation weight 1 on the rollouts of `chosen` [N] bool."""
    ones = torch.ones(rollouts.tokens.shape, dtype=torch.float32, device=rollouts.tokens.device)
    return TokenWeights(policy=ones, distil=ones * chosen.to(ones.device).unsqueeze(1))
