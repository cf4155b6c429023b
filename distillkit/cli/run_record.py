"""What a run's trainer needs to know of the run folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from distillkit.errors import ConfigError, problem
from distillkit.reporting.run_folder import RunFolder

__all__ = ["RunRecord", "check_csv_logger"]


class RunRecord(Callback):
    """Adds the hashes of data and models to `environment.json` once they are loaded.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask data and module for their fingerprints; all ranks do, since computing one may be collective."""
        data: Any = getattr(trainer, "datamodule", None)
        modules: dict[str, Any] = {"data": data, "models": pl_module}
        facts = {key: module.fingerprint() for key, module in modules.items() if hasattr(module, "fingerprint")}
        if trainer.is_global_zero:
            self.folder.record(facts)


def check_csv_logger(logger: CSVLogger, run: RunFolder) -> None:
    """Refuse a `CSVLogger` that would delete a `metrics.csv`, warn about one that only repeats ours.

    Raises:
        ConfigError: there is a `metrics.csv` where it writes, or the run folder is where it writes.
    """
    folder = Path(logger.log_dir)
    if (folder / "metrics.csv").exists() or folder.absolute() == run.path.absolute():
        raise ConfigError(
            problem(
                "trainer.logger: Lightning's CSVLogger deletes the metrics.csv that is there when it starts",
                got=str(folder / "metrics.csv"),
                expected="a folder without one",
                hint=f"leave CSVLogger out: every run writes {run.metrics_csv}",
            )
        )
    warnings.warn(f"CSVLogger writes the metrics a second time, beside {run.metrics_csv}", stacklevel=2)
