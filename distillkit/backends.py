"""What differs between one process and a distributed strategy, as seen by the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from distillkit.backbone import Batching, available
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.types import RolloutBatch, StudentScores, TeacherScores

__all__ = ["LocalBackend", "StepBackend"]

ReduceOp = Literal["sum", "max", "min"]


class StepBackend(ABC):
    """Forward, backward and optimizer of one update, and agreement between ranks.

    Every strategy averages the gradients of several ranks; the step multiplies its loss by `world_size` to undo that.
    """

    world_size: int = 1
    rank: int = 0

    @abstractmethod
    def score(
        self, batch: RolloutBatch, plan: ScorePlan, teacher: TeacherScores | None, reference: TeacherScores | None
    ) -> StudentScores:
        """Run one forward of the (wrapped) student."""

    def available(self, batching: Batching) -> Batching:
        """Return `batching`, or `sorted` where the student runs no packed rows."""
        return "sorted" if batching == "packed" else batching

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; ranks exchange them when `last`."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients of the update."""

    @abstractmethod
    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        """Clip to the global norm over all shards, when `max_norm` is set, and return the norm before clipping."""

    @abstractmethod
    def optimizer_step(self) -> None:
        """Apply the accumulated gradients."""

    @abstractmethod
    def all_reduce(self, values: Tensor, op: ReduceOp) -> Tensor:
        """Combine a small tensor over ranks; every rank gets the same result."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[StudentScorer]:
        """Return a context with the whole student, to sample with or to export; every rank has to enter."""


class LocalBackend(StepBackend):
    """One process, one optimizer, plain torch: what a notebook uses.

    Args:
        scorer: the student.
        optimizer: over its parameters.
        autocast: dtype of a `torch.autocast` around forwards; None runs in the parameters' dtype.
    """

    def __init__(
        self, scorer: StudentScorer, optimizer: torch.optim.Optimizer, *, autocast: torch.dtype | None = None
    ) -> None:
        self.scorer = scorer
        self.optimizer = optimizer
        self.autocast = autocast

    def score(
        self, batch: RolloutBatch, plan: ScorePlan, teacher: TeacherScores | None, reference: TeacherScores | None
    ) -> StudentScores:
        device = batch.tokens.device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast):
            scores: StudentScores = self.scorer(batch, plan, teacher, reference)
        return scores

    def available(self, batching: Batching) -> Batching:
        return available(batching, self.scorer.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        parameters = [p for p in self.scorer.parameters() if p.requires_grad]
        return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def all_reduce(self, values: Tensor, op: ReduceOp) -> Tensor:
        return values

    def whole(self) -> AbstractContextManager[StudentScorer]:
        return nullcontext(self.scorer)
