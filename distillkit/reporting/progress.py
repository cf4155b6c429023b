"""The progress bar: steps, reward, divergence, length, tokens per second; plain lines where there is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distillkit.errors import ConfigError, problem
from distillkit.reporting.screen import duration, say

__all__ = ["StepProgress"]

_SHOWN = (
    ("train/reward", "reward {:.3f}"),
    ("train/unscored", "unscored {:.0f}"),
    ("train/divergence", "divergence {:.3f}"),
    ("train/completion_length", "length {:.1f}"),
    ("tokens_per_second/step", "{:,.0f} tok/s"),
)


class StepProgress(ProgressBar):
    """Show how far a run is and how it does.

    In a terminal: a bar of steps done of `max_steps` (or of all epochs' batches; a pulse where neither is known), time
    left, mean reward, divergence (nats/token), completion length (tokens), tokens per second of the whole step; short
    bars for validation, test and prediction. Elsewhere (a log file, a pipe, a notebook): one line every `every_n_steps`
    steps. Each validation leaves one line with its pass@1 in both.

    Args:
        every_n_steps: between plain lines.
        plain: lines instead of a bar; None decides by whether the standard output is a terminal.
    """

    def __init__(self, *, every_n_steps: int = 10, plain: bool | None = None) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ConfigError(problem("StepProgress.every_n_steps", got=every_n_steps, expected="at least 1"))
        self.every_n_steps = every_n_steps
        self.plain = plain
        self._enabled = True
        self._progress: Progress | None = None
        self._train: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._start_time = 0.0
        self._start_step = 0
        self._last_printed = -1

    def disable(self) -> None:
        """Show nothing (ranks above 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether this rank shows anything; Lightning's `self.print` asks."""
        return self._enabled

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            say(self._console, sep.join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar at the steps that are done already."""
        self._start_time, self._start_step = time.monotonic(), _steps_done(trainer, pl_module)
        self._last_printed = self._start_step
        if (progress := self._bars()) is not None:
            self._train = progress.add_task("step", total=_steps_planned(trainer), completed=self._start_step, info="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, or print a line: at the first and the last step, and every `every_n_steps`."""
        if not self._enabled:
            return
        done = _steps_done(trainer, pl_module)
        if self._progress is not None and self._train is not None:
            info = " ".join(_words(trainer.callback_metrics))
            self._progress.update(self._train, completed=done, info=info)
        elif done % self.every_n_steps == 0 or done in (self._start_step + 1, _steps_planned(trainer)):
            self._print_step(trainer, done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state on the screen."""
        done = _steps_done(trainer, pl_module)
        if self._enabled and self._progress is None and done > self._last_printed:
            self._print_step(trainer, done)
        self._stop()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for the bar of the sanity check."""
        self._bars()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away."""
        self._end_evaluation()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start a bar for each validation set."""
        if self.has_dataloader_changed(dataloader_idx):
            name = "check" if trainer.sanity_checking else "val"
            self._start_evaluation(name, self.total_val_batches_current_dataloader)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance it."""
        self._advance_evaluation(batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away and leave a line with what was measured."""
        self._end_evaluation()
        if not self._enabled or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        shown = {name: value for name, value in values.items() if name.endswith("/pass@1")} or values
        words = [f"{name.removeprefix('val/')} {value:.3f}" for name, value in shown.items()]
        if words:
            self.print(f"{_step_of(trainer, _steps_done(trainer, pl_module))}  validation  {'  '.join(words)}")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start a bar for each test set."""
        if self.has_dataloader_changed(dataloader_idx):
            self._start_evaluation("test", self.total_test_batches_current_dataloader)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance it."""
        self._advance_evaluation(batch_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away."""
        self._end_evaluation()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start a bar for each prediction set."""
        if self.has_dataloader_changed(dataloader_idx):
            self._start_evaluation("predict", self.total_predict_batches_current_dataloader)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance it."""
        self._advance_evaluation(batch_idx)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away."""
        self._end_evaluation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop()

    @property
    def _console(self) -> Console:
        return self._progress.console if self._progress is not None else Console()

    def _bars(self) -> Progress | None:
        plain = not sys.stdout.isatty() if self.plain is None else self.plain
        if not self._enabled or plain:
            return None
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[info]}", markup=False),
                console=Console(),
                refresh_per_second=4,
                speed_estimate_period=3600,
            )
            self._progress.start()
        return self._progress

    def _start_evaluation(self, name: str, total: int | float) -> None:
        self._remove_evaluation()
        if (progress := self._bars()) is not None:
            self._evaluation = progress.add_task(name, total=total if math.isfinite(total) else None, info="")

    def _advance_evaluation(self, batch_idx: int) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.update(self._evaluation, completed=batch_idx + 1)

    def _end_evaluation(self) -> None:
        self._remove_evaluation()
        self.reset_dataloader_idx_tracker()

    def _remove_evaluation(self) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
        self._evaluation = None

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._train = self._evaluation = None

    def _print_step(self, trainer: Trainer, done: int) -> None:
        self._last_printed = done
        elapsed = time.monotonic() - self._start_time
        words = [*_words(trainer.callback_metrics), f"{duration(elapsed)} elapsed"]
        total = _steps_planned(trainer)
        if total is not None and self._start_step < done < total:
            words.append(f"{duration(elapsed / (done - self._start_step) * (total - done))} left")
        self.print(f"{_step_of(trainer, done)}  {'  '.join(words)}")


def _words(metrics: Mapping[str, Any]) -> list[str]:
    shown = {name: float(metrics[name]) for name, _ in _SHOWN if name in metrics}
    if not shown.get("train/unscored"):
        shown.pop("train/unscored", None)
    return [words.format(shown[name]) for name, words in _SHOWN if name in shown]


def _steps_done(trainer: Trainer, pl_module: LightningModule) -> int:
    """Rollout steps: the module's own count where it has one, else the training batches of all epochs."""
    count = getattr(pl_module, "rollout_step", None)
    return count if isinstance(count, int) else trainer.fit_loop.epoch_loop.batch_progress.total.ready


def _steps_planned(trainer: Trainer) -> int | None:
    """`max_steps`, else `max_epochs` times the batches of one, None when neither ends."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    return int(batches * epochs) if math.isfinite(batches) and epochs is not None and epochs > 0 else None


def _step_of(trainer: Trainer, done: int) -> str:
    total = _steps_planned(trainer)
    return f"step {done}" if total is None else f"step {done}/{total}"
