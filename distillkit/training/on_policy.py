"""The on-policy module: Lightning around `distillkit.step`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from distillkit.backbone import Batching
from distillkit.betas.constant import Constant
from distillkit.components import (
    Aggregation,
    BetaScheduler,
    Component,
    DistillThrough,
    DivergenceEstimator,
    Masker,
    PolicyObjective,
    RewardFn,
    RolloutSampler,
    TeacherScorer,
)
from distillkit.data import PromptBatch
from distillkit.lora import LoraSettings
from distillkit.models import Dtype
from distillkit.prepared import StepSettings
from distillkit.refusals import StepParts, check_parts
from distillkit.rewards import as_reward
from distillkit.step import DistillationStep
from distillkit.training.base import StudentModule, at_least
from distillkit.types import SampleRequest

__all__ = ["OnPolicyDistillation"]


class OnPolicyDistillation(StudentModule):
    """Trains a student on its own rollouts with rewards, a teacher, or both.

    One `training_step` is one rollout step; `trainer.max_steps` counts those. The parts fill the slots of the step, see
    `distillkit components`; an empty slot is null.

    Args:
        student: checkpoint to train: a local folder, a hub name, or `embedded:student`.
        sampler: draws the rollouts.
        rewards: task rewards, each with an optional weight.
        teacher: scores the student's tokens.
        divergence: between student and teacher.
        beta: coefficient of the divergence, a number or a schedule.
        distill_through: differentiate the divergence (loss), or use it detached as an advantage or a reward.
        masker: which tokens each term may learn from.
        objective: the policy gradient; null distils alone.
        reference: a second frozen model to stay near to.
        reference_divergence: between student and reference, as a loss.
        reference_beta: coefficient of the reference divergence.
        schedules: named numbers that change with the step, such as `sampler.temperature` or `policy_weight`.
        inner_epochs: passes over each rollout batch.
        minibatches: updates per pass.
        tokens_per_micro_batch: token budget of one forward and backward, padding included.
        batching: rollouts of a forward in one packed row, or padded: sorted by length or in_order.
        head_chunk: token positions per call of the output head; null keeps a chunk's logits near 64 MiB on a CPU and
            256 MiB elsewhere, and on a CPU goes over the vocabulary instead, all positions at once, where sums over it
            are enough.
        max_grad_norm: global gradient norm; null does not clip.
        distil_temperature: of both sides in divergences.
        policy_weight: factor on the objective's advantages.
        normalize: denominators count tokens before (eligible) or after (kept) the masker.
        distil_aggregation: of the divergence; null follows the objective.
        reward_shaping: mean or sum over a rollout's tokens when distilling through the reward.
        importance_cap: truncation of the correction for tokens that another policy sampled; null switches it off.
        skip_zero_weight: do not send rollouts through the student whose every coefficient is 0.
        one_step_off: sample the next step's rollouts, with the weights before this step's update, while that runs.
        dtype: of the student's weights.
        lora: train low-rank adapters beside the student's weights, which stay as they are; null trains the weights.
        gradient_checkpointing: recompute the student's layers in the backward pass.
        optimizer: over the student's trainable parameters.
        lr_scheduler: stepped once per rollout step.
        max_skipped_updates: stop after so many non-finite updates, or steps without any reward, in a row.
        validate_at_start: evaluate before the first step.
    """

    def __init__(
        self,
        *,
        student: str,
        sampler: RolloutSampler,
        rewards: list[RewardFn] | None = None,
        teacher: TeacherScorer | None = None,
        divergence: DivergenceEstimator | None = None,
        beta: BetaScheduler | float | None = None,
        distill_through: DistillThrough = "loss",
        masker: Masker | None = None,
        objective: PolicyObjective | None = None,
        reference: TeacherScorer | None = None,
        reference_divergence: DivergenceEstimator | None = None,
        reference_beta: BetaScheduler | float | None = None,
        schedules: dict[str, BetaScheduler] | None = None,
        inner_epochs: int = 1,
        minibatches: int = 1,
        tokens_per_micro_batch: int = 16384,
        batching: Batching = "packed",
        head_chunk: int | None = None,
        max_grad_norm: float | None = 1.0,
        distil_temperature: float = 1.0,
        policy_weight: float = 1.0,
        normalize: Literal["eligible", "kept"] = "eligible",
        distil_aggregation: Aggregation | None = None,
        reward_shaping: Literal["mean", "sum"] = "mean",
        importance_cap: float | None = 2.0,
        skip_zero_weight: bool = True,
        one_step_off: bool = False,
        dtype: Dtype = "float32",
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_updates: int = 5,
        validate_at_start: bool = True,
    ) -> None:
        super().__init__(
            student=student,
            sampler=sampler,
            rewards=[as_reward(reward) for reward in rewards or ()],
            frozen={key: part for key, part in (("teacher", teacher), ("reference", reference)) if part is not None},
            dtype=dtype,
            lora=lora,
            head_chunk=head_chunk,
            gradient_checkpointing=gradient_checkpointing,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            max_skipped_updates=max_skipped_updates,
            validate_at_start=validate_at_start,
        )
        self.parts = StepParts(
            sampler=sampler,
            teacher=teacher,
            reference=reference,
            rewards=self.rewards,
            divergence=divergence,
            reference_divergence=reference_divergence,
            beta=_as_beta(beta),
            reference_beta=_as_beta(reference_beta),
            masker=masker,
            objective=objective,
            schedules=schedules or {},
        )
        self.settings = StepSettings(
            distill_through=distill_through,
            inner_epochs=at_least("inner_epochs", inner_epochs, 1),
            minibatches=at_least("minibatches", minibatches, 1),
            tokens_per_micro_batch=at_least("tokens_per_micro_batch", tokens_per_micro_batch, 1),
            batching=batching,
            max_grad_norm=max_grad_norm,
            distil_temperature=distil_temperature,
            policy_weight=policy_weight,
            normalize=normalize,
            distil_aggregation=distil_aggregation,
            reward_shaping=reward_shaping,
            importance_cap=importance_cap,
            skip_zero_weight=skip_zero_weight,
            one_step_off=one_step_off,
        )
        check_parts(self.parts, distill_through, distil_temperature, one_step_off=one_step_off)

    def components(self) -> list[Component]:
        """Return the parts of the step, teacher and reference excepted."""
        frozen = list(self.frozen.values())
        return [part for part in self.parts.components() if part not in frozen]

    def schedules(self) -> dict[str, BetaScheduler]:
        """Return β, the reference's β and `model.schedules` by their YAML path."""
        own = {"model.beta": self.parts.beta, "model.reference_beta": self.parts.reference_beta}
        more = {f"model.schedules.{path}": schedule for path, schedule in self.parts.schedules.items()}
        return {path: schedule for path, schedule in {**own, **more}.items() if schedule is not None}

    def build(self, training: bool) -> None:
        """Make the step."""
        self.step = DistillationStep(self.parts, self.settings, self.scorer, self.student_info)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Run one rollout step: sample, score, learn, log."""
        last = self.rollout_step + 1 == self.trainer.max_steps
        ahead = self.settings.one_step_off and not last
        output = self.step.run(
            self._requests(batch),
            step=self.rollout_step,
            backend=self.backend,
            following=self._requests(self.prompt_data.after(batch)) if ahead else (),
        )
        self.finish_step(output, batch)

    def on_validation_epoch_start(self) -> None:
        """Let the next step's rollouts finish before the sampler is used and its weights change."""
        if hasattr(self, "step"):
            self.step.ahead.wait()
        super().on_validation_epoch_start()

    def teardown(self, stage: str) -> None:
        """Stop what runs beside the step, then the parts."""
        if hasattr(self, "step"):
            self.step.close()
        super().teardown(stage)

    def step_state(self) -> dict[str, Any]:
        """Return the schedules' state, the last metrics, and the rollouts that every rank has sampled ahead."""
        state = self.step.state_dict()
        every: list[dict[str, Any]] = [state["ahead"]]
        if self.trainer.world_size > 1:
            every = [{} for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(every, state["ahead"])
        whole = all(every)  # else no rank's: some would sample anew and some would not
        return {**state, "ahead": {i: own for part in every for i, own in part.items()} if whole else {}}

    def load_step_state(self, state: Mapping[str, Any]) -> None:
        """Restore `step_state`."""
        self.step.load_state_dict(state)

    def _requests(self, batch: PromptBatch) -> list[SampleRequest]:
        return [
            SampleRequest(
                prompt_ids=prompt.prompt_ids,
                prompt=prompt.prompt,
                row=prompt.row,
                group_id=batch.offset + i,
                seed=_seed_of(self.seed, batch.offset + i),
                settings=self.parts.sampler.settings,
                policy_version=self.rollout_step,
            )
            for i, prompt in enumerate(batch.prompts)
        ]


def _as_beta(value: BetaScheduler | float | None) -> BetaScheduler | None:
    return Constant(value=float(value)) if isinstance(value, int | float) else value


def _seed_of(seed: int, position: int) -> int:
    """A 63-bit seed from the run's seed and the group's place in the stream: no two groups share their draws."""
    digest = hashlib.sha256(f"rollout/{seed}/{position}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
