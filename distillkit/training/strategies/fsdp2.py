"""FSDP2: every rank keeps a shard of weights, gradients and optimizer state, and gathers one layer at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distillkit.scorer import StudentScorer
from distillkit.training.strategies.plain_copy import detached, filled
from distillkit.training.strategies.sharded_checkpoint import remove_sharded, replaced_folder
from distillkit.training.strategies.single import LightningBackend

__all__ = ["FSDP2Backend", "FSDP2Strategy"]


class FSDP2Strategy(ModelParallelStrategy):
    """`fully_shard` over all ranks, on GPUs and (gloo) on CPUs; a checkpoint is a folder with a file per rank.

    Args:
        process_group_backend: `nccl` or `gloo`; None fits the device.
        timeout: after which a rank that waits for the others gives up.
    """

    def __init__(
        self, *, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            # Lightning's "auto" puts all ranks of a host into tensor parallelism: nothing would be reduced over data.
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    def shard(self, scorer: StudentScorer) -> None:
        """Shard the student in place: each transformer layer by itself, the rest (embedding, norm, head) together."""
        mesh = self.device_mesh["data_parallel"]
        mixed = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        for layer in _layers(scorer.model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(scorer, mesh=mesh, mp_policy=policy)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        with replaced_folder(self, filepath) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            remove_sharded(filepath)


class FSDP2Backend(LightningBackend):
    """Runs updates of a student that `FSDP2Strategy.shard` has sharded.

    Gradients are reduced with every micro-batch: kept whole until the last one they would need the memory that sharding
    saves.
    """

    def __init__(self, module: pl.LightningModule, scorer: StudentScorer, skeleton: StudentScorer) -> None:
        super().__init__(module, scorer)
        self._skeleton = skeleton

    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        norm = super().clip_and_norm(max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self) -> AbstractContextManager[StudentScorer]:
        return filled(self._skeleton, self.scorer, _gather)


def _gather(parameter: nn.Parameter) -> Tensor:
    return detached(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers: what the model's authors say must not be split."""
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
