"""The supervised module: Lightning around `distillkit.training.given`, for SFT and offline distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedModel

from distillkit.backbone import Batching
from distillkit.betas.constant import Constant
from distillkit.components import (
    BetaScheduler,
    Component,
    DivergenceEstimator,
    RewardFn,
    RolloutSampler,
    TeacherScorer,
)
from distillkit.data import PromptBatch
from distillkit.errors import ConfigError, problem
from distillkit.lora import LoraSettings
from distillkit.models import Dtype
from distillkit.prepared import StepSettings
from distillkit.refusals import check_supervised
from distillkit.rewards import as_reward
from distillkit.training.base import StudentModule, at_least
from distillkit.training.fresh import check_entries, fresh_causal_lm, fresh_config, fresh_fingerprint
from distillkit.training.given import SupervisedStep, given_rollouts

__all__ = ["SupervisedModule"]


class SupervisedModule(StudentModule):
    """Trains a student on given completions: supervised fine-tuning, offline distillation, or both.

    The data needs a column `completion` (`data.train.columns: {completion: ...}`). One `training_step` is one update
    over `data.prompts_per_step` rows; `trainer.max_steps` counts those. The loss is that of `SupervisedStep`.

    Args:
        student: checkpoint to train: a local folder, a hub name, or `embedded:student`. With `init`, only its tokenizer
            is used.
        init: train a new model with random weights: the entries of a Hugging Face config, `model_type` (such as qwen3)
            and the fields that differ from its defaults. Vocabulary size and special tokens are the tokenizer's. The
            weights follow from the entries and `seed_everything`.
        sampler: answers the problems of `data.val`.
        rewards: judge those answers.
        teacher: scores the given tokens.
        divergence: between student and teacher; `forward_kl` is the usual one. Estimates that need the student's own
            samples (k1, k2, k3) are refused.
        beta: coefficient of the divergence, a number or a schedule.
        sft_weight: coefficient of the cross-entropy; 0 distils alone.
        aggregation: mean over the update's tokens (token), or over each completion's tokens, then over completions.
        tokens_per_micro_batch: token budget of one forward and backward, padding included.
        batching: rollouts of a forward in one packed row, or padded: sorted by length or in_order.
        head_chunk: token positions per call of the output head; null keeps a chunk's logits near 64 MiB on a CPU and
            256 MiB elsewhere, and on a CPU goes over the vocabulary instead, all positions at once, where sums over it
            are enough.
        max_grad_norm: global gradient norm; null does not clip.
        distil_temperature: of both sides in the divergence.
        dtype: of the student's weights.
        lora: train low-rank adapters beside the student's weights, which stay as they are; null trains the weights.
        gradient_checkpointing: recompute the student's layers in the backward pass.
        optimizer: over the student's trainable parameters.
        lr_scheduler: stepped once per step.
        max_skipped_updates: stop after so many non-finite updates in a row.
        validate_at_start: evaluate before the first step.

    Raises:
        ConfigError: parts or entries of `init` that cannot work.
    """

    needs_completions = True
    plateau_metric = "train/loss"

    def __init__(
        self,
        *,
        student: str,
        init: dict[str, Any] | None = None,
        sampler: RolloutSampler | None = None,
        rewards: list[RewardFn] | None = None,
        teacher: TeacherScorer | None = None,
        divergence: DivergenceEstimator | None = None,
        beta: BetaScheduler | float | None = None,
        sft_weight: float = 1.0,
        aggregation: Literal["token", "sequence"] = "token",
        tokens_per_micro_batch: int = 16384,
        batching: Batching = "packed",
        head_chunk: int | None = None,
        max_grad_norm: float | None = 1.0,
        distil_temperature: float = 1.0,
        dtype: Dtype = "float32",
        lora: LoraSettings | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_skipped_updates: int = 5,
        validate_at_start: bool = True,
    ) -> None:
        super().__init__(
            student=student,
            sampler=sampler,
            rewards=[as_reward(reward) for reward in rewards or ()],
            frozen={} if teacher is None else {"teacher": teacher},
            dtype=dtype,
            lora=lora,
            head_chunk=head_chunk,
            gradient_checkpointing=gradient_checkpointing,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            max_skipped_updates=max_skipped_updates,
            validate_at_start=validate_at_start,
        )
        self.teacher, self.divergence = teacher, divergence
        self.beta = Constant(value=float(beta)) if isinstance(beta, int | float) else beta
        self.sft_weight, self.aggregation = sft_weight, aggregation
        self.settings = StepSettings(
            tokens_per_micro_batch=at_least("tokens_per_micro_batch", tokens_per_micro_batch, 1),
            batching=batching,
            max_grad_norm=max_grad_norm,
            distil_temperature=distil_temperature,
        )
        check_supervised(teacher=teacher, divergence=divergence, beta=self.beta, sft_weight=sft_weight)
        self.init = init
        if init is not None:
            check_entries(init)
            if lora is not None:
                where = "model.lora: adapters beside random weights, which would never learn"
                raise ConfigError(problem(where, got="model.init", expected="one of the two", hint="model.lora: null"))

    def components(self) -> list[Component]:
        """Return the parts, the teacher excepted."""
        parts = (self.sampler, *self.rewards, self.divergence, self.beta)
        return [part for part in parts if part is not None]

    def schedules(self) -> dict[str, BetaScheduler]:
        """Return β by its YAML path."""
        return {} if self.beta is None else {"model.beta": self.beta}

    def setup(self, stage: str) -> None:
        """Refuse evaluation sets that nothing could answer, then set up."""
        evaluates = stage != "fit" or self.trainer.enable_validation
        if self.sampler is None and evaluates and self.prompt_data.val:
            names = ", ".join(eval_set.name for eval_set in self.prompt_data.val)
            hint = "model.sampler: {name: hf, max_new_tokens: 512}, or data.val: []"
            where = f"model.sampler: evaluation sets are answered by sampling ({names})"
            raise ConfigError(problem(where, got="null", expected="a sampler", hint=hint))
        super().setup(stage)

    def build(self, training: bool) -> None:
        """Make the step."""
        self.step = SupervisedStep(
            student=self.student_info,
            settings=self.settings,
            teacher=self.teacher,
            divergence=self.divergence,
            beta=self.beta,
            sft_weight=self.sft_weight,
            aggregation=self.aggregation,
        )

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Run one update on given completions."""
        rollouts = given_rollouts(batch.prompts, offset=batch.offset, student=self.student_info)
        self.finish_step(self.step.run(rollouts, step=self.rollout_step, backend=self.backend), batch)

    def step_state(self) -> dict[str, Any]:
        """Return the schedule's state and the last metrics."""
        return self.step.state_dict()

    def load_step_state(self, state: Mapping[str, Any]) -> None:
        """Restore `step_state`."""
        self.step.load_state_dict(state)

    def fingerprint(self) -> dict[str, str]:
        """Return digests of the models; with `init`, of its entries beside the tokenizer's folder."""
        digests = super().fingerprint()
        return digests if self.init is None else {**digests, "init": fresh_fingerprint(self.init)}

    def load_student(self) -> PreTrainedModel:
        """Return the model to train: a checkpoint, or a new one."""
        if self.init is None:
            return super().load_student()
        return fresh_causal_lm(fresh_config(self.init, self.tokenizer), seed=self.seed, dtype=self.dtype_name)

    def student_vocab_size(self) -> int:
        """Return V of the student's output head, before the model is there."""
        if self.init is None:
            return super().student_vocab_size()
        return int(fresh_config(self.init, self.tokenizer).get_text_config().vocab_size)

    def student_end_tokens(self) -> tuple[int, ...]:
        """Return the ids that end a completion."""
        return super().student_end_tokens() if self.init is None else (int(self.tokenizer.eos_token_id),)
