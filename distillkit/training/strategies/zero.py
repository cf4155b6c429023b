"""DeepSpeed ZeRO: stage 2 shards gradients and optimizer state, stage 3 the weights too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from distillkit.errors import ConfigError, problem
from distillkit.scorer import ScorePlan, StudentScorer
from distillkit.training.strategies.plain_copy import detached, filled
from distillkit.training.strategies.sharded_checkpoint import remove_sharded, replaced_folder
from distillkit.training.strategies.single import LightningBackend
from distillkit.types import RolloutBatch, StudentScores, TeacherScores

__all__ = ["ZeroBackend", "ZeroStrategy"]


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy on GPUs, and the same on CPUs, where Lightning refuses and DeepSpeed does not.

    A checkpoint is a folder with a file per rank, replaced as a whole; its tensors are read with `weights_only=True`.

    Args:
        logging_level: of DeepSpeed; it warns of outputs that it does not know, the step's, which need not its hooks.
        settings: of Lightning's `DeepSpeedStrategy`, such as `stage`, `reduce_bucket_size` and `config`.
    """

    def __init__(self, *, logging_level: int = logging.ERROR, **settings: Any) -> None:
        super().__init__(logging_level=logging_level, **settings)

    @property
    def root_device(self) -> torch.device:
        device: torch.device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed compares the index

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:
            super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: pl.Trainer) -> None:
        # Batches hold prompts; Lightning would look for tensors to cast in them, and refuses frozen dataclasses.
        vars(self.precision_plugin)["convert_input"] = lambda data: data
        super().setup(trainer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        with replaced_folder(self, filepath) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        try:
            with _tensors_only(self.deepspeed_engine):
                return super().load_checkpoint(checkpoint_path, weights_only)
        except ZeRORuntimeException as error:
            where = "--ckpt_path: a ZeRO checkpoint is for as many ranks as wrote it"
            hint = "the trainer.devices and trainer.num_nodes that the run had; fsdp2 checkpoints are for any number"
            raise ConfigError(problem(where, got=error, hint=hint)) from error

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            remove_sharded(filepath)


class ZeroBackend(LightningBackend):
    """Runs updates through the DeepSpeed engine.

    Each micro-batch's forward is a call of the engine: the engine counts micro-batches there, and at stage 3 one that
    it did not see overwrites the gradient of the one before.
    """

    def __init__(self, module: pl.LightningModule, scorer: StudentScorer, skeleton: StudentScorer | None) -> None:
        super().__init__(module, scorer)
        self._skeleton = skeleton

    @property
    def _engine(self) -> Any:
        return self.module.trainer.strategy.model

    def score(
        self, batch: RolloutBatch, plan: ScorePlan, teacher: TeacherScores | None, reference: TeacherScores | None
    ) -> StudentScores:
        torch.clear_autocast_cache()
        scores: StudentScores = self._engine(batch, plan, teacher, reference)
        return scores

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self.module.manual_backward(loss)

    def zero_grad(self) -> None:
        optimizer = self._engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if not self._engine.zero_optimization_partition_weights():
            # Stage 2 keeps the reduced gradients apart until its step; an update that is dropped has none.
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = -1

    def clip_and_norm(self, max_norm: float | None) -> Tensor:
        # The engine clips in its step, by the same formula as torch: max_norm ÷ (norm + 1e-6), at most 1.
        optimizer = self._engine.optimizer
        optimizer.clip_grad = 0.0 if max_norm is None else max_norm
        norm = torch.as_tensor(_global_norm(optimizer)).float()
        return torch.where(norm < 0, torch.full_like(norm, float("inf")), norm)  # -1 stands for not finite

    def whole(self) -> AbstractContextManager[StudentScorer]:
        if self._skeleton is None:
            return nullcontext(self.scorer)
        # What was fetched ahead for a forward that did not come, as another split into micro-batches ends sooner than
        # the last, is still on its way.
        self._engine.empty_partition_cache()
        return filled(self._skeleton, self.scorer, _gather)


def _global_norm(optimizer: Any) -> Any:
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        return optimizer.scaled_global_norm()
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(optimizer._get_norm_groups())


def _gather(parameter: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return detached(parameter)


@contextmanager
def _tensors_only(engine: Any) -> Iterator[None]:
    """Let the engine read checkpoints without unpickling anything but tensors and its own plain classes."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    reader = engine.checkpoint_engine

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location=map_location, weights_only=True)

    reader.load = load
    try:
        yield
    finally:
        del reader.load
