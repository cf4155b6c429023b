"""A run that ends after so many tokens, so that methods of different rollout lengths are compared at equal cost."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from distillkit.errors import ConfigError, problem
from distillkit.training.base import StudentModule

__all__ = ["TokenBudget"]


class TokenBudget(Callback):
    """Ends a run after the step in which its completion tokens reach a budget, as `max_steps` would end it.

    Counted are the tokens that a step learns from or leaves to its masks: those that the student sampled or, in
    supervised training, was given; over all ranks, once however many inner epochs there are, prompts left out. The
    count is `train/completion_tokens`, is part of the checkpoint, and goes on when a run is continued. Evaluation
    samples are free. Whichever is first ends the run, the budget or `trainer.max_steps`.

    Args:
        completion_tokens: the budget, in tokens.

    Raises:
        ConfigError: a budget below 1.

    Example:
        >>> TokenBudget(completion_tokens=1_000_000).tokens
        0
    """

    def __init__(self, *, completion_tokens: int) -> None:
        if completion_tokens < 1:
            where = "trainer.callbacks, TokenBudget.completion_tokens"
            raise ConfigError(problem(where, got=completion_tokens, expected="at least 1 token"))
        self.completion_tokens = completion_tokens
        self.tokens = 0
        self._step = 0
        self._module: StudentModule | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the module whose steps are counted.

        Raises:
            ConfigError: it is not one of distillkit's.
        """
        if not isinstance(pl_module, StudentModule):
            expected = "OnPolicyDistillation or SupervisedModule"
            where = "trainer.callbacks: TokenBudget counts the tokens of distillkit's steps"
            raise ConfigError(problem(where, got=type(pl_module).__name__, expected=expected))
        self._module = pl_module

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here; a run that was over its budget when it was saved ends at once."""
        assert self._module is not None
        self._step = self._module.rollout_step
        trainer.should_stop = trainer.should_stop or self.tokens >= self.completion_tokens

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Count the step, log, and ask Lightning to stop once the budget is used up."""
        self._count()
        assert self._module is not None
        for logger in trainer.loggers:
            logger.log_metrics({"train/completion_tokens": self.tokens}, step=self._module.rollout_step)
        self._module.log("train/completion_tokens", float(self.tokens), logger=False, batch_size=1)
        if self.tokens >= self.completion_tokens:
            used = f"{self.tokens:,} of {self.completion_tokens:,} completion tokens"
            self._module.print(f"Token budget reached: {used} after step {self._module.rollout_step}")
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the module."""
        self._count()
        self._module = None

    def state_dict(self) -> dict[str, Any]:
        """Return the count, with the step that has just been taken: another callback may save before ours is called."""
        self._count()
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.tokens = state_dict["tokens"]

    def _count(self) -> None:
        """Add the tokens of a step that is not counted yet; collective, as checkpoints and steps are."""
        module = self._module
        if module is None or module.last_output is None or module.rollout_step == self._step:
            return
        mine = module.last_output.rollouts.loss_mask.sum().to(device=module.device, dtype=torch.int64)
        everyone = module.trainer.strategy.reduce(mine, reduce_op="sum")
        self.tokens, self._step = self.tokens + int(everyone), module.rollout_step
