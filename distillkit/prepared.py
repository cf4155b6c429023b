"""What an update starts from: the step's numbers, its parts, and a batch about which everything is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distillkit.backbone import Batching
from distillkit.components import Aggregation, DistillThrough, DivergenceEstimator, Masker, PolicyObjective
from distillkit.scorer import ScorePlan
from distillkit.types import RewardOutput, RolloutBatch, SamplingSettings, TeacherScores, TokenWeights

__all__ = ["Coefficients", "PreparedBatch", "StepContext", "StepSettings"]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The step's own numbers, named as in the YAML under `model`.

    `tokens_per_micro_batch` counts padding. `normalize: eligible` divides by the tokens before the masker, so that
    masking does not raise the effective β; `kept` by those after it. `distil_aggregation` None follows the objective
    (`token` without one). `importance_cap` truncates the correction of tokens that another policy sampled; None
    switches it off.
    `reward_shaping` says how a rollout's divergence enters its reward under `distill_through: reward`.
    """

    distill_through: DistillThrough = "loss"
    inner_epochs: int = 1
    minibatches: int = 1
    tokens_per_micro_batch: int = 16384
    batching: Batching = "packed"
    max_grad_norm: float | None = 1.0
    distil_temperature: float = 1.0
    policy_weight: float = 1.0
    normalize: Literal["eligible", "kept"] = "eligible"
    distil_aggregation: Aggregation | None = None
    reward_shaping: Literal["mean", "sum"] = "mean"
    importance_cap: float | None = 2.0
    skip_zero_weight: bool = True
    one_step_off: bool = False


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The parts and scalars of one step, schedules applied."""

    step: int
    sampling: SamplingSettings
    objective: PolicyObjective | None
    divergence: DivergenceEstimator | None
    masker: Masker | None
    reference_divergence: DivergenceEstimator | None
    beta: float
    reference_beta: float
    policy_weight: float
    distil_temperature: float
    scheduled: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return the scheduled numbers by metric name."""
        betas = {"train/beta": self.beta} if self.divergence is not None else {}
        if self.reference_divergence is not None:
            betas["train/reference_beta"] = self.reference_beta
        return {**betas, **{f"schedule/{path}": value for path, value in self.scheduled.items()}}


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedBatch:
    """Everything decided before the first backward; [N, L] float32 grids, detached.

    `old_logprobs` is None when the first forward of the only update gives them; `frozen_divergence` is the divergence
    of the old policy, where the distillation goes through an advantage or a reward and a pass was needed to know it.
    Without `same_engine`, the distance between sampler and trainer is recorded, as `train/staleness_gap` where weights
    sampled that are `stale`, else as `train/engine_gap`; `max_engine_gap` stops a run where it is more nats/token.
    """

    rollouts: RolloutBatch
    rewards: RewardOutput | None
    teacher: TeacherScores | None
    reference: TeacherScores | None
    weights: TokenWeights
    context: StepContext
    plan: ScorePlan
    same_engine: bool
    max_engine_gap: float | None = None
    stale: bool = False
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    scored: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    old_logprobs: Tensor | None = None
    frozen_divergence: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Coefficients:
    """The detached factor [N, L] of each loss term.

    `learning` [N] marks the rollouts with a factor that is not 0, `sent` [n] lists those that go through the student.
    """

    policy: Tensor
    distil: Tensor
    reference: Tensor
    learning: Tensor
    sent: Tensor
