"""The small matrix: which recipe each method is, and the trials it may choose its learning rate and β from.

Every method has four trials. A method with a coefficient that matters crosses two learning rates with two values of it;
one without (distillation alone: Adam does not see the scale of a single loss) tries four learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["METHODS", "SEEDS", "TUNING_SEED", "Method", "Stage"]

SEEDS = (1, 2, 3)
"""Seeds of the reported runs; none of them was seen in tuning."""

TUNING_SEED = 100

_RATE = "model.optimizer.init_args.lr"
_SUPERVISED_RATE = "model.init_args.optimizer.init_args.lr"
_PAIR = (2e-4, 4e-4)

Trial = Mapping[str, float]
"""Dotted path of a recipe -> value."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One `distillkit fit`: a recipe, settings that no trial changes, and the share of the token budget it may use."""

    recipe: str
    share: float = 1.0
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the matrix. A trial's values go to the last stage."""

    title: str
    stages: tuple[Stage, ...]
    trials: tuple[Trial, ...]


def _rates() -> tuple[Trial, ...]:
    return tuple({_RATE: rate} for rate in (1e-4, 2e-4, 3e-4, 6e-4))


def _supervised_rates() -> tuple[Trial, ...]:
    return tuple({_SUPERVISED_RATE: rate} for rate in (3e-4, 6e-4, 1e-3, 2e-3))


def _crossed(**values: tuple[float, float]) -> tuple[Trial, ...]:
    [(name, pair)] = values.items()
    return tuple({_RATE: rate, f"model.{name.replace('__', '.')}": value} for rate in _PAIR for value in pair)


def _annealed() -> tuple[Trial, ...]:
    pairs = ((0.2, 0.04), (0.5, 0.1))
    return tuple({_RATE: rate, "model.beta.start": a, "model.beta.end": b} for rate in _PAIR for a, b in pairs)


def _one(title: str, recipe: str, trials: tuple[Trial, ...]) -> Method:
    return Method(title=title, stages=(Stage(recipe=f"small/{recipe}"),), trials=trials)


_BETAS = (0.05, 0.2)

METHODS: dict[str, Method] = {
    "grpo": _one("GRPO", "grpo", _rates()),
    "sft": _one("SFT on teacher traces", "sft", _supervised_rates()),
    "sft_then_rl": Method(
        title="SFT, then GRPO",
        stages=(
            Stage(recipe="small/sft", share=0.5, settings={_SUPERVISED_RATE: 3e-4}),
            Stage(recipe="small/sft_then_rl", share=0.5),
        ),
        trials=_rates(),
    ),
    "offline_kd": _one("offline KD (forward KL)", "offline_kd", _supervised_rates()),
    "kd_rkl": _one("KD-RKL (k2 alone)", "kd_rkl", _rates()),
    "kdrl_k2": _one("KDRL, k2", "kdrl_k2", _crossed(beta=_BETAS)),
    "kdrl_k3": _one("KDRL, k3", "kdrl_k3", _crossed(beta=_BETAS)),
    "kdrl_topk": _one("KDRL, top-k", "kdrl_topk", _crossed(beta=_BETAS)),
    "kdrl_reward_shaping": _one("KDRL, reward shaping", "kdrl_reward_shaping", _crossed(beta=_BETAS)),
    "kdrl_annealed": _one("KDRL, k2, annealed β", "kdrl_annealed", _annealed()),
    "kdrl_response_mask": _one("KDRL, k2, response-level mask", "kdrl_response_mask", _crossed(beta=_BETAS)),
    "kdrl_group_mask": _one("KDRL, k2, group-level mask", "kdrl_group_mask", _crossed(beta=_BETAS)),
    "rlad_alpha_03": _one("RLAD, α = 0.3", "rlad_alpha_03", _rates()),
    "rlad_alpha_05": _one("RLAD, α = 0.5", "rlad_alpha_05", _rates()),
    "rlad_alpha_07": _one("RLAD, α = 0.7", "rlad_alpha_07", _rates()),
    "rlad_alpha_10": _one("RLAD, α = 1 (GRPO's ratio)", "rlad_alpha_10", _rates()),
    "rlkd": _one("RLKD", "rlkd", tuple({_RATE: r, "model.rewards.1.weight": w} for r in _PAIR for w in (0.25, 0.5))),
    "opd_then_rl": _one(
        "OPD, then RL",
        "opd_then_rl",
        tuple(
            {_RATE: rate, "model.beta.at": at, "model.schedules.policy_weight.at": at}
            for rate in _PAIR
            for at in (20, 40)
        ),
    ),
}
"""Name -> method, in the order of the tables."""
