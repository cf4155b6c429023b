"""The step's backend under a Lightning strategy: one process, or DDP."""

from __future__ import annotations

from contextlib import nullcontext

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from distillkit.backends import ReduceOp, StepBackend
from distillkit.errors import ConfigError, problem
from distillkit.models import ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, StudentScores, TeacherScores

__all__ = ["LightningBackend", "check_trainer"]


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse trainer settings that manual optimization cannot honour, naming ours.

    Raises:
        ConfigError: `gradient_clip_val`, `accumulate_grad_batches`, float16 precision, or a number of epochs.
    """
    if trainer.gradient_clip_val is not None:
        where = "trainer.gradient_clip_val: distillkit clips the gradient itself"
        hint = f"model.max_grad_norm: {trainer.gradient_clip_val}"
        raise ConfigError(problem(where, got=trainer.gradient_clip_val, hint=hint))
    if trainer.accumulate_grad_batches != 1:
        where = "trainer.accumulate_grad_batches: an update is split by tokens, not by batches"
        hint = "model.tokens_per_micro_batch for memory, model.minibatches for updates per step"
        raise ConfigError(problem(where, got=trainer.accumulate_grad_batches, expected="1", hint=hint))
    if trainer.precision == "bf16-true":
        where = "trainer.precision: the student's own dtype is the model's setting"
        hint = "model.dtype: bfloat16 with trainer.precision: 32-true, or trainer.precision: bf16-mixed"
        raise ConfigError(problem(where, got=trainer.precision, hint=hint))
    if trainer.precision in ("16-mixed", "16-true"):
        where = "trainer.precision: float16 needs a loss scale that on-policy updates do not have"
        raise ConfigError(problem(where, got=trainer.precision, hint="trainer.precision: bf16-mixed"))


class LightningBackend(StepBackend):
    """Runs the step's updates through a `LightningModule` under manual optimization.

    Args:
        module: has an attached trainer and one optimizer.
        scorer: the student.
    """

    def __init__(self, module: pl.LightningModule, scorer: StudentScorer) -> None:
        self.module = module
        self.scorer = scorer
        self.world_size = module.trainer.world_size
        self.rank = module.trainer.global_rank

    def score(
        self, batch: RolloutBatch, plan: ScorePlan, teacher: TeacherScores | None, reference: TeacherScores | None
    ) -> StudentScores:
        # Autocast keeps low-precision copies of the weights for as long as its context lives, which here is the whole
        # training step: copies made while sampling carry no gradient, and copies made before an update are stale.
        torch.clear_autocast_cache()
        scores: StudentScores = self.scorer(batch, plan, teacher, reference)
        return scores

    def backward(self, loss: Tensor, *, last: bool) -> None:
        wrapped = self.module.trainer.strategy.model
        held = wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last else None
        with held if held is not None else nullcontext():
            self.module.manual_backward(loss)

    def zero_grad(self) -> None:
        self._optimizer().zero_grad(set_to_none=True)

    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        parameters = [p for p in self.scorer.parameters() if p.requires_grad]
        return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    def optimizer_step(self) -> None:
        strategy = self.module.trainer.strategy
        strategy.optimizer_step(self._optimizer(), closure=lambda: None, model=self.module)

    def all_reduce(self, values: Tensor, op: ReduceOp) -> Tensor:
        if self.world_size == 1:
            return values
        reduced = self.module.trainer.strategy.reduce(values.clone(), reduce_op=op)
        assert isinstance(reduced, Tensor)
        return reduced

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.module.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer
