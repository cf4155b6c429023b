"""Small Lightning classes with the slots of the real ones, so that a whole `fit` takes a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.utils.data import DataLoader, TensorDataset

from distillkit.cli.lightning import DistillCLI
from distillkit.cli.run_record import RunRecord
from distillkit.components import (
    BetaScheduler,
    DivergenceEstimator,
    Masker,
    PolicyObjective,
    RewardFn,
    RolloutSampler,
    TeacherScorer,
)
from distillkit.errors import ConfigError, DataError
from distillkit.training.checkpoints import LastCheckpoint


@dataclass(frozen=True)
class Source:
    """Rows."""

    path: str
    limit: int | None = None


class Module(pl.LightningModule):
    """A linear model under the names of the real module."""

    def __init__(
        self,
        *,
        student: str,
        sampler: RolloutSampler | None = None,
        teacher: TeacherScorer | None = None,
        rewards: list[RewardFn] | None = None,
        divergence: DivergenceEstimator | None = None,
        beta: BetaScheduler | float | None = None,
        masker: Masker | None = None,
        objective: PolicyObjective | None = None,
        schedules: dict[str, BetaScheduler] | None = None,
        inner_epochs: int = 1,
        crash: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if crash == "constructor":
            raise ConfigError("model.crash: refused by the constructor")
        self.parts = (sampler, teacher, rewards, divergence, beta, masker, objective, schedules)
        self.crash = crash
        self.make_optimizer = optimizer
        self.layer = torch.nn.Linear(2, 1)
        self.run_folder: Any = None

    def fingerprint(self) -> dict[str, str]:
        return {"student": "abc"}

    def setup(self, stage: str) -> None:
        if self.crash == "data":
            raise DataError("data.train.path: no such file")

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.crash == "step" and self.global_step == 2:
            raise RuntimeError("something\nbroke")
        if self.crash == "ctrl-c" and self.global_step == 2:
            raise KeyboardInterrupt
        if self.crash == "sigterm" and self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class OtherModule(pl.LightningModule):
    """A module of its own, chosen by class path."""

    def __init__(self, *, width: int = 3, rewards: list[RewardFn] | None = None) -> None:
        super().__init__()


class Data(pl.LightningDataModule):
    """Random rows."""

    def __init__(self, *, train: Source | None = None, val: list[Source] | None = None, rows: int = 8) -> None:
        super().__init__()
        self.rows = rows

    def fingerprint(self) -> dict[str, Mapping[str, str]]:
        return {"data.train": {"content": "def"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(self.rows, 2)), batch_size=2)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


class CLI(DistillCLI):
    """The command line of the stand-ins, with the callbacks that do not need a language model."""

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__(argv, model_class=Module, data_class=Data)

    def callbacks(self, given: Sequence[Callback]) -> list[Callback]:
        return [RunRecord(self.folder), LastCheckpoint(every_n_steps=1)]


class Parsed(CLI):
    """Stops when the config is parsed."""

    def instantiate_classes(self) -> None:
        raise StopIteration

    @classmethod
    def config(cls, *argv: str) -> Mapping[str, Any]:
        """The canonical config of a command line."""
        try:
            cls._last = None
            cls(argv)
        except StopIteration:
            pass
        assert cls._last is not None
        return cls._last.canonical

    _last: Parsed | None = None

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        type(self)._last = self


class Named(torch.optim.SGD):
    """An optimizer with an argument that parts may not have."""

    def __init__(self, params: Any, name: int = 0) -> None:
        super().__init__(params, lr=0.1)


def length_penalty(completions: list[str], scale: float = 1.0) -> list[float]:
    """A reward function without **kwargs."""
    return [-scale * len(text) for text in completions]


def any_columns(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward function that takes what comes."""
    return [1.0 for _ in completions]
