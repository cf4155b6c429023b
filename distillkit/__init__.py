"""distillkit: train a student language model on its own rollouts, with a task reward and a teacher at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.betas.adaptive_kl import AdaptiveKL
    from distillkit.betas.constant import Constant
    from distillkit.betas.cosine import Cosine
    from distillkit.betas.linear import Linear
    from distillkit.betas.reward_progress import RewardProgress
    from distillkit.betas.switch import Switch
    from distillkit.data import DataSource, EvalSet, PromptData
    from distillkit.divergences.full import JSD, ForwardKL, ReverseKL
    from distillkit.divergences.power import PowerDivergence
    from distillkit.divergences.sampled import K1, K2, K3
    from distillkit.divergences.skew import SkewForwardKL, SkewReverseKL
    from distillkit.divergences.todi import ToDi
    from distillkit.divergences.topk import TopK
    from distillkit.lora import LoraSettings
    from distillkit.maskers.group_level import GroupLevel
    from distillkit.maskers.response_level import ResponseLevel
    from distillkit.maskers.routed import Routed
    from distillkit.objectives.cispo import CISPO
    from distillkit.objectives.grpo import GRPO
    from distillkit.objectives.gspo import GSPO
    from distillkit.objectives.rlsd import RLSD
    from distillkit.objectives.trrd import TRRD
    from distillkit.rewards.answer import AnswerReward
    from distillkit.rewards.gsrm.judge import ExactJudge
    from distillkit.rewards.gsrm.local import LocalDecomposer
    from distillkit.rewards.gsrm.reward import StructureReward
    from distillkit.rewards.math_verify import MathVerify
    from distillkit.runs import make_trainer
    from distillkit.samplers.hf import HFSampler
    from distillkit.samplers.mixed import MixedSampler
    from distillkit.samplers.replay import ReplaySampler
    from distillkit.step import DistillationStep
    from distillkit.teachers.adapter_off import AdapterOffTeacher
    from distillkit.teachers.cached import CachedTeacher
    from distillkit.teachers.extrapolated import ExtrapolatedTeacher
    from distillkit.teachers.local import LocalTeacher
    from distillkit.teachers.mixture import MixtureTeacher
    from distillkit.training.budget import TokenBudget
    from distillkit.training.on_policy import OnPolicyDistillation
    from distillkit.training.supervised import SupervisedModule

__version__ = "0.1.0"

_HOMES = {
    "AdapterOffTeacher": "distillkit.teachers.adapter_off",
    "AdaptiveKL": "distillkit.betas.adaptive_kl",
    "AnswerReward": "distillkit.rewards.answer",
    "CISPO": "distillkit.objectives.cispo",
    "CachedTeacher": "distillkit.teachers.cached",
    "Constant": "distillkit.betas.constant",
    "Cosine": "distillkit.betas.cosine",
    "DataSource": "distillkit.data",
    "DistillationStep": "distillkit.step",
    "EvalSet": "distillkit.data",
    "ExactJudge": "distillkit.rewards.gsrm.judge",
    "ExtrapolatedTeacher": "distillkit.teachers.extrapolated",
    "ForwardKL": "distillkit.divergences.full",
    "GRPO": "distillkit.objectives.grpo",
    "GSPO": "distillkit.objectives.gspo",
    "GroupLevel": "distillkit.maskers.group_level",
    "HFSampler": "distillkit.samplers.hf",
    "JSD": "distillkit.divergences.full",
    "K1": "distillkit.divergences.sampled",
    "K2": "distillkit.divergences.sampled",
    "K3": "distillkit.divergences.sampled",
    "Linear": "distillkit.betas.linear",
    "LocalDecomposer": "distillkit.rewards.gsrm.local",
    "LocalTeacher": "distillkit.teachers.local",
    "LoraSettings": "distillkit.lora",
    "MathVerify": "distillkit.rewards.math_verify",
    "MixedSampler": "distillkit.samplers.mixed",
    "MixtureTeacher": "distillkit.teachers.mixture",
    "OnPolicyDistillation": "distillkit.training.on_policy",
    "PowerDivergence": "distillkit.divergences.power",
    "PromptData": "distillkit.data",
    "RLSD": "distillkit.objectives.rlsd",
    "ReplaySampler": "distillkit.samplers.replay",
    "ResponseLevel": "distillkit.maskers.response_level",
    "ReverseKL": "distillkit.divergences.full",
    "RewardProgress": "distillkit.betas.reward_progress",
    "Routed": "distillkit.maskers.routed",
    "SkewForwardKL": "distillkit.divergences.skew",
    "SkewReverseKL": "distillkit.divergences.skew",
    "StructureReward": "distillkit.rewards.gsrm.reward",
    "SupervisedModule": "distillkit.training.supervised",
    "Switch": "distillkit.betas.switch",
    "TRRD": "distillkit.objectives.trrd",
    "ToDi": "distillkit.divergences.todi",
    "TokenBudget": "distillkit.training.budget",
    "TopK": "distillkit.divergences.topk",
    "make_trainer": "distillkit.runs",
}

__all__ = [
    "CISPO",
    "GRPO",
    "GSPO",
    "JSD",
    "K1",
    "K2",
    "K3",
    "RLSD",
    "TRRD",
    "AdapterOffTeacher",
    "AdaptiveKL",
    "AnswerReward",
    "CachedTeacher",
    "Constant",
    "Cosine",
    "DataSource",
    "DistillationStep",
    "EvalSet",
    "ExactJudge",
    "ExtrapolatedTeacher",
    "ForwardKL",
    "GroupLevel",
    "HFSampler",
    "Linear",
    "LocalDecomposer",
    "LocalTeacher",
    "LoraSettings",
    "MathVerify",
    "MixedSampler",
    "MixtureTeacher",
    "OnPolicyDistillation",
    "PowerDivergence",
    "PromptData",
    "ReplaySampler",
    "ResponseLevel",
    "ReverseKL",
    "RewardProgress",
    "Routed",
    "SkewForwardKL",
    "SkewReverseKL",
    "StructureReward",
    "SupervisedModule",
    "Switch",
    "ToDi",
    "TokenBudget",
    "TopK",
    "make_trainer",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `distillkit --help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
