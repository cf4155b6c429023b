"""distillkit: train a student language model on its own rollouts, with a task reward and a teacher at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.betas.constant import Constant
    from distillkit.betas.cosine import Cosine
    from distillkit.betas.linear import Linear
    from distillkit.data import DataSource, EvalSet, PromptData
    from distillkit.divergences.full import JSD, ForwardKL, ReverseKL
    from distillkit.divergences.sampled import K1, K2, K3
    from distillkit.divergences.topk import TopK
    from distillkit.maskers.group_level import GroupLevel
    from distillkit.maskers.response_level import ResponseLevel
    from distillkit.objectives.grpo import GRPO
    from distillkit.objectives.trrd import TRRD
    from distillkit.rewards.answer import AnswerReward
    from distillkit.rewards.math_verify import MathVerify
    from distillkit.runs import make_trainer
    from distillkit.samplers.hf import HFSampler
    from distillkit.samplers.replay import ReplaySampler
    from distillkit.step import DistillationStep
    from distillkit.teachers.cached import CachedTeacher
    from distillkit.teachers.local import LocalTeacher
    from distillkit.training.on_policy import OnPolicyDistillation
    from distillkit.training.supervised import SupervisedModule

__version__ = "0.1.0"

_HOMES = {
    "AnswerReward": "distillkit.rewards.answer",
    "CachedTeacher": "distillkit.teachers.cached",
    "Constant": "distillkit.betas.constant",
    "Cosine": "distillkit.betas.cosine",
    "DataSource": "distillkit.data",
    "DistillationStep": "distillkit.step",
    "EvalSet": "distillkit.data",
    "ForwardKL": "distillkit.divergences.full",
    "GRPO": "distillkit.objectives.grpo",
    "GroupLevel": "distillkit.maskers.group_level",
    "HFSampler": "distillkit.samplers.hf",
    "JSD": "distillkit.divergences.full",
    "K1": "distillkit.divergences.sampled",
    "K2": "distillkit.divergences.sampled",
    "K3": "distillkit.divergences.sampled",
    "Linear": "distillkit.betas.linear",
    "LocalTeacher": "distillkit.teachers.local",
    "MathVerify": "distillkit.rewards.math_verify",
    "OnPolicyDistillation": "distillkit.training.on_policy",
    "PromptData": "distillkit.data",
    "ReplaySampler": "distillkit.samplers.replay",
    "ResponseLevel": "distillkit.maskers.response_level",
    "ReverseKL": "distillkit.divergences.full",
    "SupervisedModule": "distillkit.training.supervised",
    "TRRD": "distillkit.objectives.trrd",
    "TopK": "distillkit.divergences.topk",
    "make_trainer": "distillkit.runs",
}

__all__ = [
    "GRPO",
    "JSD",
    "K1",
    "K2",
    "K3",
    "TRRD",
    "AnswerReward",
    "CachedTeacher",
    "Constant",
    "Cosine",
    "DataSource",
    "DistillationStep",
    "EvalSet",
    "ForwardKL",
    "GroupLevel",
    "HFSampler",
    "Linear",
    "LocalTeacher",
    "MathVerify",
    "OnPolicyDistillation",
    "PromptData",
    "ReplaySampler",
    "ResponseLevel",
    "ReverseKL",
    "SupervisedModule",
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
