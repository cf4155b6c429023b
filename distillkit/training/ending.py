"""The end of a run that fails."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

__all__ = ["EndWithError"]

_LOG = logging.getLogger(__name__)


class EndWithError(Callback):
    """Tears the module down after an exception, as Lightning does only without one.

    Servers, pools and threads then end with the run, and not with the interpreter, which waits for threads first.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            pl_module.teardown(str(trainer.state.fn))
        except Exception as error:  # the first error is the one to report
            _LOG.warning("while ending the run: %s: %s", type(error).__name__, error)
