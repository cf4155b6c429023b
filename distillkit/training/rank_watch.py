"""When one rank of a run ends too early, all end, and say why."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from distillkit.errors import ConfigError, DistillkitError, TrainingStopped, problem
from distillkit.reporting.run_folder import RunFolder
from distillkit.training.roll_call import Gone, Hub, Member, RollCall

__all__ = ["RankWatch", "explained"]

_HEARSAY_S = 3.0
"""How long an error waits for the news that another rank's end is its cause."""
_SAID = 2000
_OWN = (DistillkitError, KeyboardInterrupt, SIGTERMException)
"""Errors that are this rank's own."""


class RankWatch(Callback):
    """Ends this rank when another one has ended, whatever this one is doing.

    A rank that raises tells the others; one that is killed, or whose machine is gone, is noticed by its connection.
    A collective call that waits for it may fail at once (gloo) or go on waiting (NCCL): this rank then ends after
    `grace_s`, and so does one that is busy elsewhere.

    Args:
        grace_s: seconds that this rank has to end by itself, before it is ended.
    """

    def __init__(self, *, grace_s: float = 10.0) -> None:
        if grace_s <= 0:
            raise ConfigError(problem("rank_watch.grace_s", got=grace_s, expected="above 0"))
        self.grace_s = grace_s
        self.lost: TrainingStopped | None = None
        self._call: RollCall | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._known, self._ends = threading.Event(), threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect with the other ranks; all have to come here."""
        if trainer.world_size == 1:
            return
        self.lost = None
        self._known, self._ends = threading.Event(), threading.Event()

        def on_gone(gone: Gone) -> None:
            self._end_after(gone, trainer, pl_module)

        if trainer.is_global_zero:
            hub = Hub(on_gone)
            trainer.strategy.broadcast((hub.port, hub.token))
            self._call = hub
        else:
            port, token = trainer.strategy.broadcast((0, ""))
            environment: Any = trainer.strategy
            address = environment.cluster_environment.main_address
            try:
                self._call = Member(on_gone, address=address, port=port, token=token, rank=trainer.global_rank)
            except OSError as error:
                what = f"rank {trainer.global_rank} cannot reach rank 0 at {address}:{port} ({error})"
                warnings.warn(f"{what}: only time-outs will tell it that another rank has ended", stacklevel=2)
                return
        self._call.start()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others, unless what failed here is that one of them is gone."""
        atexit.unregister(_leave_group)  # of an earlier run: collectives that nobody ends may be under way now
        if self._call is None:
            return
        if not isinstance(exception, _OWN):
            self._known.wait(_HEARSAY_S)
        self._ends.set()
        if self.lost is not None:
            exception.add_note(str(self.lost))
        self._leave(f"{type(exception).__name__}: {exception}"[:_SAID])
        self._adopt_children(trainer)
        atexit.register(_end, self._children, self.grace_s + _HEARSAY_S)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave in order."""
        self._ends.set()
        self._leave(None)
        if trainer.world_size > 1:
            atexit.unregister(_leave_group)
            atexit.register(_leave_group)

    def _leave(self, said: str | None) -> None:
        if self._call is not None:
            self._call.leave(said)
            self._call = None

    def _end_after(self, gone: Gone, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note that a rank is gone, and end this one if it does not notice; runs beside the training."""
        if self._ends.is_set():
            return
        last = RunFolder(Path(trainer.default_root_dir)).last_ckpt
        ckpt = f"--ckpt_path last goes on from {last}" if last.exists() else "there is no checkpoint yet"
        where = (
            f"rank {gone.rank} on {gone.host} has ended before the run, in or about step {pl_module.rollout_step + 1}"
        )
        got = gone.said or "no word from it: killed (for memory? by the scheduler?), or its machine is gone"
        hint = f"see its output; {ckpt}"
        self.lost = TrainingStopped(problem(where, got=got.replace("\n", "\n" + " " * 14), hint=hint))
        self._known.set()
        self._adopt_children(trainer)
        if self._ends.wait(self.grace_s):
            return
        print(f"{type(self.lost).__name__}: {self.lost}", file=sys.stderr, flush=True)
        if trainer.is_global_zero:
            RunFolder(Path(trainer.default_root_dir)).end("failed", f"{type(self.lost).__name__}: {where}")
        _end(self._children, 0.0)
        os._exit(1)

    def _adopt_children(self, trainer: pl.Trainer) -> None:
        """Take over the processes that Lightning started: it would kill this one with them, before it has said why."""
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            self._children += launcher.procs
            launcher.procs.clear()


def explained(error: BaseException, trainer: pl.Trainer | None) -> BaseException:
    """Return the end of another rank where that is what `error` comes from, else `error`."""
    callbacks: Sequence[Callback] = getattr(trainer, "callbacks", ())
    lost = next((callback.lost for callback in callbacks if isinstance(callback, RankWatch)), None)
    return error if lost is None or isinstance(error, _OWN) else lost


def _leave_group() -> None:
    """Destroy the process group while the interpreter is there, at the end of a process whose run ended in order.

    A worker thread of gloo may hold the tensors of the last collective a moment longer than the call. When it lets go
    of them after Python has ended, the process aborts. Lightning destroys the group of NCCL alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end(children: list[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Wait for processes to end, and kill those that do not."""
    deadline = time.monotonic() + grace_s
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
