"""What the on-policy and the supervised module share: the student, evaluation, steps, and what a resumed run needs."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillkit import embedded
from distillkit.components import BetaScheduler, Component, RewardFn, RolloutSampler, StudentInfo, TeacherScorer
from distillkit.data import PromptBatch, PromptData
from distillkit.errors import ConfigError, DataError, ModelError, problem
from distillkit.lora import LoraSettings, adapter_state, apply_lora, check_same_lora, student_base
from distillkit.models import (
    Dtype,
    enable_gradient_checkpointing,
    end_token_ids,
    fingerprint,
    load_causal_lm,
    load_tokenizer,
    model_vocab_size,
)
from distillkit.schedules import unfinished
from distillkit.scorer import StudentScorer
from distillkit.training.checkpoints import random_states, restore_random
from distillkit.training.ending import EndWithError
from distillkit.training.evaluating import EvaluatingModule
from distillkit.training.fruitless import FruitlessSteps
from distillkit.training.positions import beyond_positions, longest_sequences
from distillkit.training.strategies import backend_for, check_trainer, shards_weights
from distillkit.training.strategies.fsdp2 import FSDP2Strategy
from distillkit.training.strategies.plain_copy import skeleton
from distillkit.training.strategies.single import LightningBackend
from distillkit.training.teacher_rows import check_teacher_rows
from distillkit.types import StepOutput, StudentScores

__all__ = ["StudentModule", "at_least"]


class StudentModule(EvaluatingModule):
    """A student with its own steps: `training_step` of a subclass runs one and calls `finish_step`.

    Args:
        student: checkpoint to train.
        sampler: draws completions in evaluation (and in training, where the subclass samples).
        rewards: judge completions.
        frozen: models that only score; they are never part of the module's parameters or checkpoint.
        dtype: of the student's weights.
        lora: train adapters beside the weights instead of the weights.
        head_chunk: token positions per head call.
        gradient_checkpointing: recompute activations in the backward pass.
        optimizer: over the trainable parameters.
        lr_scheduler: stepped once per step.
        max_skipped_updates: stop after so many dropped updates, or steps without any reward, in a row.
        validate_at_start: evaluate before the first step.
    """

    needs_completions = False
    """Train on given completions, which no reward judges."""
    plateau_metric = "train/reward"
    """What a `ReduceLROnPlateau` watches."""

    def __init__(
        self,
        *,
        student: str,
        sampler: RolloutSampler | None,
        rewards: Sequence[RewardFn],
        frozen: Mapping[str, TeacherScorer],
        dtype: Dtype,
        head_chunk: int | None,
        gradient_checkpointing: bool,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        max_skipped_updates: int,
        validate_at_start: bool,
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student, self.sampler = student, sampler
        self.rewards, self.frozen, self.dtype_name = tuple(rewards), frozen, dtype
        self.lora, self.strict_loading = lora, lora is None  # with LoRA, a checkpoint has the adapters alone
        self.head_chunk = None if head_chunk is None else at_least("head_chunk", head_chunk, 1)
        self.gradient_checkpointing = gradient_checkpointing
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.max_skipped_updates = at_least("max_skipped_updates", max_skipped_updates, 1)
        self.validate_at_start = validate_at_start
        self.rollout_step = 0
        self.last_output: StepOutput | None = None
        self.bad_gold: list[str] = []
        self._cursor = 0
        self._fruitless = FruitlessSteps(self.max_skipped_updates)
        self._random: Mapping[str, Any] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._info: StudentInfo | None = None
        self._fingerprint: dict[str, str] | None = None
        self._skeleton: list[StudentScorer] = []  # in a list, so that it is no part of the module

    @abstractmethod
    def components(self) -> Sequence[Component]:
        """Return every part that has to be set up, frozen models excepted."""

    @abstractmethod
    def build(self, training: bool) -> None:
        """Make what the steps need, once the student is loaded and every part is set up."""

    def schedules(self) -> Mapping[str, BetaScheduler]:
        """Return the schedules of the steps by their YAML path."""
        return {}

    def step_state(self) -> dict[str, Any]:
        """Return what the subclass adds to a checkpoint."""
        return {}

    def load_step_state(self, state: Mapping[str, Any]) -> None:
        """Restore `step_state`."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.student, where="model.student")
        return self._tokenizer

    @property
    def student_model(self) -> torch.nn.Module:
        """The model inside the scorer, adapters included: what is exported."""
        return self.scorer.model

    @property
    def student_info(self) -> StudentInfo:
        """What the parts know of the student; there from `setup` on."""
        if self._info is None:
            raise ModelError(problem(type(self).__name__, got="used before setup", hint="run it with a Trainer"))
        return self._info

    @property
    def prompt_data(self) -> PromptData:
        """The run's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptData):
            got = type(data).__name__ if data is not None else "none"
            hint = "trainer.fit(module, datamodule=PromptData(...))"
            where = "trainer: the data module"
            raise ConfigError(problem(where, got=got, expected="distillkit.data.PromptData", hint=hint))
        return data

    @property
    def seed(self) -> int:
        """The run's seed, from `seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def fingerprint(self) -> dict[str, str]:
        """Return digests of the models as the run found them, for `environment.json` and for resuming."""
        if self._fingerprint is None:
            own = {"student": fingerprint(self.student)} | ({"lora": self.lora.fingerprint()} if self.lora else {})
            self._fingerprint = own | {key: part.identity() for key, part in self.frozen.items()}
        return self._fingerprint

    def load_student(self) -> PreTrainedModel:
        """Return the model to train."""
        return load_causal_lm(self.student, where="model.student", dtype=self.dtype_name)

    def student_vocab_size(self) -> int:
        """Return V of the student's output head, before the model is loaded."""
        return model_vocab_size(self.student, where="model.student")

    def student_end_tokens(self) -> tuple[int, ...]:
        """Return the ids that end a completion."""
        return end_token_ids(self.tokenizer, _generation_config(self.student))

    def setup(self, stage: str) -> None:
        """Check data and tokenizers first, then load the frozen models and the student, then start the parts."""
        if self._info is not None:
            return
        training = stage == "fit"
        check_trainer(self.trainer)
        if training:
            self._note(unfinished(self.schedules(), self.trainer.max_steps))
        self._check_gold(training)
        check_teacher_rows(self.frozen if training else {}, self.prompt_data)
        self._info = self._student_info(training)
        for part in self.frozen.values() if training else ():
            part.setup(self._info)
        scorer = getattr(self, "scorer", None)
        model = self.load_student() if scorer is None else scorer.model
        if scorer is None and self.lora is not None:
            model = apply_lora(model, self.lora, seed=self.seed)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        sharded = shards_weights(self.trainer)
        if not sharded:  # else a rank has no room for all of it on its device
            torch.nn.Module.to(model, self._info.device)
        model.train()
        self.student_parameters = sum(p.numel() for p in model.parameters())
        self.scorer = StudentScorer(model, vocab_limit=self._info.vocab_limit, head_chunk=self.head_chunk)
        self._skeleton = [skeleton(self.scorer)] if sharded else []
        for component in self.components():
            component.setup(self._info)
        self._note(beyond_positions(model.config, longest_sequences(self, training)))
        self.build(training)

    def configure_model(self) -> None:
        """Shard the student, where the strategy does it by layers."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            strategy.shard(self.scorer)

    def forward(self, *args: Any) -> StudentScores:
        """Score a micro-batch: what a strategy that wraps the module calls."""
        scores: StudentScores = self.scorer(*args)
        return scores

    @property
    def backend(self) -> LightningBackend:
        """What runs the step's updates under the trainer's strategy."""
        return backend_for(self, self.scorer, *self._skeleton)

    def configure_callbacks(self) -> list[Callback]:
        """Tear down after an exception too."""
        return [EndWithError()]

    def teardown(self, stage: str) -> None:
        """Stop pools and free the frozen models."""
        for component in (*self.components(), *self.frozen.values()):
            component.teardown()
        self._info = None

    def configure_optimizers(self) -> Any:
        """Build optimizer and learning-rate scheduler over the trainable parameters."""
        optimizer = self.make_optimizer([p for p in self.scorer.parameters() if p.requires_grad])
        if self.make_lr_scheduler is None:
            return optimizer
        return [optimizer], [self.make_lr_scheduler(optimizer)]

    def on_train_start(self) -> None:
        """Evaluate the untouched student, as step 0."""
        if self.rollout_step == 0 and self.validate_at_start and self.trainer.enable_validation:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Restore the random states of a resumed run, after everything that might have drawn from them."""
        if self._random is not None:
            restore_random(self._random)
            self._random = None

    def finish_step(self, output: StepOutput, batch: PromptBatch) -> None:
        """Count the step, move the learning rate, log, and stop a run whose updates are all dropped."""
        self.rollout_step += 1
        self._cursor = batch.next_cursor
        optimizer = self.trainer.optimizers[0]
        metrics = {**output.metrics, "train/learning_rate": optimizer.param_groups[0]["lr"]}
        self._count_step()
        self._step_scheduler(output)
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.rollout_step)
        # For callbacks that monitor. `log_dict` goes through every name for each: most of the time of a small step.
        values = torch.tensor([float(value) for value in metrics.values()], device=self.device).unbind()
        self.trainer.callback_metrics.update(zip(metrics, values, strict=True))
        self.last_output = output
        # Lightning validates after the step that asks it to stop, and not after the one that max_steps ends.
        self.trainer.should_stop |= 0 < self.trainer.max_steps <= self.rollout_step
        self._fruitless.count(output, self.rollout_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run needs beside weights and optimizer; with LoRA, keep of the weights the adapters."""
        if self.lora is not None and not shards_weights(self.trainer):
            checkpoint["state_dict"] = adapter_state(self, checkpoint["state_dict"])
        checkpoint["distillkit"] = {
            "rollout_step": self.rollout_step,
            "cursor": self._cursor,
            "skipped_in_a_row": self._fruitless.skipped,
            "step": self.step_state(),
            "random": random_states(),
            "models": self.fingerprint(),
            "data": self.prompt_data.fingerprint(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore `on_save_checkpoint`; other frozen models or training data than the checkpoint's are refused."""
        if "distillkit" not in checkpoint:
            hint = "model.student takes model folders"
            raise ConfigError(problem("--ckpt_path: not a distillkit checkpoint", hint=hint))
        state = checkpoint["distillkit"]
        check_same_lora(self.lora, state["models"].get("lora"))
        self.rollout_step, self._cursor = state["rollout_step"], state["cursor"]
        if self.trainer.state.fn != "fit":
            return
        self._fruitless.skipped = state["skipped_in_a_row"]
        self._random = state["random"]
        self.load_step_state(state["step"])
        now = self.fingerprint()
        for key, saved in state["models"].items():
            if now.get(key) != saved:
                where = f"model.{key}: not the model that the checkpoint was trained with"
                raise ConfigError(problem(where, got=now.get(key), expected=saved, hint="start a new run"))
        self.prompt_data.check_fingerprint(state["data"])
        self.prompt_data.start_cursor = self._cursor

    def _note(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.print(f"Note: {line}")

    def _student_info(self, training: bool) -> StudentInfo:
        tokenizer = self.tokenizer
        sizes = [self.student_vocab_size()]
        sizes += [part.vocab_size for part in self.frozen.values() if training and part.vocab_size is not None]
        assert tokenizer.pad_token_id is not None
        return StudentInfo(
            tokenizer=tokenizer,
            vocab_limit=min(sizes),
            eos_token_ids=self.student_end_tokens(),
            pad_token_id=int(tokenizer.pad_token_id),
            device=self.trainer.strategy.root_device,
            base=student_base(self.lora, self.student, self.dtype_name, lambda: self.backend.whole()),
        )

    def _check_gold(self, training: bool) -> None:
        """Ask every reward whether it can use the gold of every row, before any model is loaded."""
        data = self.prompt_data
        named = [(f"data.val.{s.name}", p) for s, p in zip(data.val, data.val_prompts, strict=False)]
        if training and data.train_prompts is not None and not self.needs_completions:
            named.insert(0, ("data.train", data.train_prompts))
        self.bad_gold = []
        for where, prompts in named:
            for reward in self.rewards:
                kept, name = set(prompts.kept), type(reward).__name__
                bad = [(i, reason) for i, reason in reward.check_rows(prompts.our_rows()) if i in kept]
                lines = [f"{prompts.rows.place(i)}: {reason}" for i, reason in bad]
                if lines and len(lines) == len(prompts):
                    what = f"{where}: {name} can use the gold answer of no row"
                    raise DataError(problem(what, got=lines[0], expected="a gold answer", hint=f"{where}.columns"))
                self.bad_gold += [f"{where}, {name}: {line}" for line in lines]

    def _count_step(self) -> None:
        # Lightning counts optimizer steps. A rollout step may take several updates, or none when all were dropped; one
        # tick per rollout step keeps `max_steps`, checkpoints and validation in the unit that users set.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def _step_scheduler(self, output: StepOutput) -> None:
        scheduler: Any = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if self.plateau_metric not in output.metrics:
                where = f"model.lr_scheduler: ReduceLROnPlateau watches {self.plateau_metric}, and this run has none"
                raise ConfigError(problem(where, hint="a schedule of the step, such as WarmupCosine"))
            scheduler.step(output.metrics[self.plateau_metric])
        elif scheduler is not None:
            scheduler.step()


def at_least(name: str, value: int, least: int) -> int:
    """Return `value`, or refuse one below `least` with its YAML path."""
    if value < least:
        raise ConfigError(problem(f"model.{name}", got=value, expected=f"at least {least}"))
    return value


def _generation_config(path: str) -> Any:
    source = embedded.resolve(path)
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
