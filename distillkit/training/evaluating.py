"""The hooks in which Lightning evaluates: answer the problems of every set with the student, judge, and log."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl

from distillkit.backends import StepBackend
from distillkit.components import RewardFn, RolloutSampler, StudentInfo
from distillkit.data import EvalBatch, PromptData
from distillkit.errors import ConfigError, problem
from distillkit.evaluation import EvalMetrics, ProblemResult, evaluate_batch

__all__ = ["EvaluatingModule"]


class EvaluatingModule(pl.LightningModule):
    """Answers and judges evaluation sets; a subclass has the student, its sampler and its rewards."""

    sampler: RolloutSampler | None
    rewards: tuple[RewardFn, ...]
    rollout_step: int

    def __init__(self) -> None:
        super().__init__()
        self.last_results: dict[str, list[ProblemResult]] = {}
        self._metrics: dict[str, EvalMetrics] = {}
        self._gathered = ExitStack()

    @property
    @abstractmethod
    def backend(self) -> StepBackend:
        """What runs the step's updates under the trainer's strategy."""

    @property
    @abstractmethod
    def student_info(self) -> StudentInfo:
        """What the parts know of the student."""

    @property
    @abstractmethod
    def prompt_data(self) -> PromptData:
        """The run's data module."""

    @property
    @abstractmethod
    def seed(self) -> int:
        """The run's seed."""

    def on_validation_epoch_start(self) -> None:
        """Start empty metrics for every evaluation set, and hand the sampler the weights."""
        stage = "test" if self.trainer.testing else "val"
        self.last_results = {}
        self._metrics = {
            s.name: EvalMetrics(s.name, k=s.k, ks=s.pass_ks, stage=stage).to(self.student_info.device)
            for s in self.prompt_data.val
        }
        self._give_sampler_weights()

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer and judge one batch of problems of one evaluation set."""
        self._metrics[batch.eval_set.name].update(self._answer(batch))

    def on_validation_epoch_end(self) -> None:
        """Log `<stage>/<set>/<metric>` of every set."""
        self._gathered.close()
        values = {name: float(v) for metrics in self._metrics.values() for name, v in metrics.compute().items()}
        self.log_dict(values, logger=False)
        if not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(values, step=self.rollout_step)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_start(self) -> None:
        """Start without results, and hand the sampler the weights."""
        self.last_results = {}
        self._give_sampler_weights()

    def on_predict_epoch_end(self) -> None:
        """Let go of the whole weights."""
        self._gathered.close()

    def predict_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return, per problem, its prompt, gold answer and completions with their rewards."""
        return [asdict(result) for result in self._answer(batch)]

    def _give_sampler_weights(self) -> None:
        if self.sampler is None:
            return
        student = self._gathered.enter_context(self.backend.whole())
        self.sampler.sync(student)
        if not self.sampler.same_engine:
            self._gathered.close()

    def _answer(self, batch: EvalBatch) -> list[ProblemResult]:
        if self.sampler is None:
            hint = "model.sampler: hf"
            raise ConfigError(problem("model.sampler: evaluation needs a sampler", got="null", hint=hint))
        results = evaluate_batch(
            batch,
            sampler=self.sampler,
            rewards=self.rewards,
            student_info=self.student_info,
            seed=self.seed,
            policy_version=self.rollout_step,
        )
        self.last_results.setdefault(batch.eval_set.name, []).extend(results)
        return results
