"""Which backend a trainer's strategy needs, and which strategies and settings cannot train here."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)

from distillkit.errors import ConfigError, problem
from distillkit.scorer import StudentScorer
from distillkit.training.strategies.fsdp2 import FSDP2Backend, FSDP2Strategy
from distillkit.training.strategies.single import LightningBackend
from distillkit.training.strategies.zero import ZeroBackend, ZeroStrategy

__all__ = ["backend_for", "check_trainer", "register", "shards_weights"]

_NAMES = "auto, ddp, fsdp2, deepspeed_stage_2, deepspeed_stage_3"


def register() -> None:
    """Make `fsdp2` known to Lightning, and let its `deepspeed…` names mean our subclass."""
    StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2: fully_shard over all ranks", override=True)
    for name, stage in {"deepspeed": 2, "deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3}.items():
        StrategyRegistry.register(name, ZeroStrategy, f"DeepSpeed ZeRO, stage {stage}", override=True, stage=stage)


def backend_for(
    module: pl.LightningModule, scorer: StudentScorer, skeleton: StudentScorer | None = None
) -> LightningBackend:
    """Return the step backend of the module's trainer.

    Args:
        module: attached to a trainer whose strategy is set up.
        scorer: the student.
        skeleton: what `plain_copy.skeleton` made of the student before it was sharded; None where nothing is.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, ZeroStrategy):
        return ZeroBackend(module, scorer, skeleton)
    if isinstance(strategy, FSDP2Strategy):
        assert skeleton is not None
        return FSDP2Backend(module, scorer, skeleton)
    return LightningBackend(module, scorer)


def shards_weights(trainer: pl.Trainer) -> bool:
    """Whether no rank holds the whole student between steps."""
    strategy = trainer.strategy
    return isinstance(strategy, FSDP2Strategy) or (isinstance(strategy, ZeroStrategy) and strategy.zero_stage_3)


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse trainer settings that manual optimization cannot honour, naming ours.

    Raises:
        ConfigError: `gradient_clip_val`, `accumulate_grad_batches`, float16 precision, or a strategy without a backend.
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
    _check_strategy(trainer.strategy)


def _check_strategy(strategy: Any) -> None:
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy) and (
        isinstance(strategy, ZeroStrategy) or not isinstance(strategy, DeepSpeedStrategy)
    ):
        return
    instead = "deepspeed_stage_2 or deepspeed_stage_3" if isinstance(strategy, DeepSpeedStrategy) else "ddp"
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        instead = "fsdp2"
    where = "trainer.strategy: the step cannot run under this strategy"
    hint = f"trainer.strategy: {instead}"
    raise ConfigError(problem(where, got=type(strategy).__name__, expected=_NAMES, hint=hint))
