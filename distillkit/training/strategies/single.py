"""One process, or DDP: every rank has the whole student."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from distillkit.backbone import Batching, available
from distillkit.backends import ReduceOp, StepBackend
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, StudentScores, TeacherScores

__all__ = ["LightningBackend"]


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

    def available(self, batching: Batching) -> Batching:
        return available(batching, self.scorer.model)

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

    def whole(self) -> AbstractContextManager[StudentScorer]:
        return nullcontext(self.scorer)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.module.trainer.optimizers[0]
