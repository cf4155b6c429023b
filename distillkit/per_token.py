"""Per-token values of an update, as the rollout file shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillkit.types import StudentScores

if TYPE_CHECKING:
    from distillkit.prepared import PreparedBatch

__all__ = ["PerTokenRecord"]


class PerTokenRecord:
    """Gathers `grids`, name -> [N, L] float32 with NaN where nothing was computed, from the first inner epoch."""

    def __init__(self, batch: PreparedBatch) -> None:
        shape = batch.rollouts.tokens.shape
        blank = torch.full(shape, float("nan"), device=batch.rollouts.tokens.device)
        self.grids: dict[str, Tensor] = {
            "student_logprobs": blank.clone(),
            "old_logprobs": blank.clone() if batch.old_logprobs is None else batch.old_logprobs,
            "policy_weight": batch.weights.policy,
            "distil_weight": batch.weights.distil,
            "advantages": batch.advantages,
        }
        self._own_old = batch.old_logprobs is None
        for name, scores in (("teacher", batch.teacher), ("reference", batch.reference)):
            if scores is not None:
                known = blank if scores.sampled is None else scores.sampled.masked_fill(~scores.valid, float("nan"))
                self.grids[f"{name}_logprobs"] = known.clone()
        if batch.plan.divergence is not None:
            self.grids["divergence"] = blank.clone() if batch.frozen_divergence is None else batch.frozen_divergence
        if batch.plan.distil_temperature != batch.plan.sampling_temperature:
            self.grids["distil_logprobs"] = blank.clone()

    def keep(self, index: Tensor, scores: StudentScores) -> None:
        """Note the scores of the rollouts `index` [n] of a micro-batch."""
        found = {
            "student_logprobs": scores.logprobs,
            "distil_logprobs": scores.distil_logprobs,
            "divergence": scores.divergence,
        }
        if self._own_old:
            found["old_logprobs"] = scores.logprobs
        if scores.teacher_logprobs is not None:
            found["teacher_logprobs"] = scores.teacher_logprobs
        for name, values in found.items():
            if values is not None and name in self.grids:
                self.grids[name][index, : values.shape[1]] = values.detach().to(self.grids[name].dtype)
