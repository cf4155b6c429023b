"""A Lightning `Trainer` as distillkit's runs use it: what `distillkit fit` and Python programs share."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from distillkit.errors import ConfigError, problem
from distillkit.reporting.metrics import MetricsCSV
from distillkit.reporting.progress import StepProgress
from distillkit.reporting.run_folder import RunFolder
from distillkit.reporting.run_report import RunReport
from distillkit.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, StudentExport
from distillkit.training.rank_watch import RankWatch

__all__ = ["TRAINER_DEFAULTS", "make_trainer", "quiet", "run_callbacks"]

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
"""Where distillkit differs from Lightning's defaults: the prompts never end, steps are counted, and the start is
evaluated for real instead of being sanity-checked."""


def run_callbacks(*, checkpoint_every: int = 10, rollouts_every: int = 10) -> list[Callback]:
    """Return the callbacks of a run: the watch over its ranks, progress, report, last checkpoint, student export."""
    return [
        RankWatch(),
        StepProgress(),
        RunReport(rollouts_every=rollouts_every),
        LastCheckpoint(every_n_steps=checkpoint_every),
        StudentExport(),
    ]


def make_trainer(
    run_dir: str | Path,
    *,
    callbacks: list[Callback] | None = None,
    logger: Logger | list[Logger] | None = None,
    checkpoint_every: int = 10,
    rollouts_every: int = 10,
    **settings: Any,
) -> pl.Trainer:
    """Return Lightning's `Trainer` with distillkit's callbacks, `metrics.csv` and atomic checkpoints in `run_dir`.

    Args:
        run_dir: a folder that does not exist yet.
        callbacks: added to the run's own.
        logger: added to `metrics.csv`.
        checkpoint_every: steps between checkpoints.
        rollouts_every: steps between rollout files.
        settings: of the `Trainer`, such as `max_steps` and `val_check_interval`.

    Raises:
        ConfigError: the folder exists and is not empty.

    Example:
        >>> import tempfile
        >>> make_trainer(tempfile.mkdtemp(), max_steps=3, accelerator="cpu").max_steps
        3
    """
    folder = Path(run_dir)
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if first and folder.exists() and any(folder.iterdir()):
        raise ConfigError(problem("run_dir: the folder exists", got=run_dir, expected="a new folder"))
    quiet()
    more = logger if isinstance(logger, list) else [] if logger is None else [logger]
    own = run_callbacks(checkpoint_every=checkpoint_every, rollouts_every=rollouts_every)
    if settings.get("enable_progress_bar") is False:
        own = [callback for callback in own if not isinstance(callback, StepProgress)]
    run = RunFolder(folder)
    return pl.Trainer(
        **{
            **TRAINER_DEFAULTS,
            **settings,
            "callbacks": [*own, *(callbacks or [])],
            "logger": [MetricsCSV(folder=run.path), *more],
            "plugins": [AtomicCheckpointIO()],
            "default_root_dir": run.path,
        }
    )


def quiet() -> None:
    """Silence progress bars and advice of the libraries beneath that say nothing about the run."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*IterableDataset.*__len__.*",
        ".*logging on epoch level.*",
        ".*`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated.*",
        ".*each worker will save a shard of the checkpoint.*",
    ):
        warnings.filterwarnings("ignore", message=message)
