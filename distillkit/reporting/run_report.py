"""What a run shows and leaves behind: a Lightning callback around screen, rollout files, results and plots."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from distillkit.components import BetaScheduler, Component, TeacherScorer
from distillkit.errors import ConfigError, problem
from distillkit.evaluation import gather_results, write_results
from distillkit.registry import name_of
from distillkit.reporting.drawing import INSTALL, can_draw
from distillkit.reporting.metrics import MetricsCSV, read_metrics, summarize_metric
from distillkit.reporting.rollouts import write_rollouts
from distillkit.reporting.run_folder import RunFolder
from distillkit.reporting.screen import (
    RowFacts,
    RunFacts,
    ScorerFacts,
    TermFacts,
    last_line,
    say,
    show_rollouts,
    show_start,
)
from distillkit.training.checkpoints import is_dry_run

__all__ = ["RunReport"]


class RunReport(Callback):
    """Shows the step as a sentence and two rollouts; writes rollouts, per-problem results and plots.

    Everything goes to the trainer's root folder: `rollouts/`, `eval/`, `plots/`, and `metrics.csv` through
    `MetricsCSV`.

    Args:
        rollouts_every: steps between rollout files; 0 writes none. Steps 1 and the last are always written.
        rollouts_limit: rollouts per file and rank; null writes all.
    """

    def __init__(self, *, rollouts_every: int = 10, rollouts_limit: int | None = 64) -> None:
        if rollouts_every < 0:
            raise ConfigError(problem("report.rollouts_every", got=rollouts_every, expected="at least 0"))
        self.rollouts_every = rollouts_every
        self.rollouts_limit = rollouts_limit
        self._console = Console(soft_wrap=True)
        self._started = time.monotonic()
        self._shown = False
        self._ended = False
        self._written = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the time, and drop metrics of steps that a resumed run computes again."""
        self._started = time.monotonic()
        self._shown = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say what the run is going to do."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and trainer.is_global_zero:
                logger.rewind(pl_module.rollout_step)
        if not trainer.is_global_zero:
            return
        if hasattr(pl_module, "parts"):
            show_start(_facts(trainer, pl_module), self._console)
        for line in pl_module.bad_gold[:10]:
            say(self._console, f"Gold not usable: {line}", style="yellow")
        if len(pl_module.bad_gold) > 10:
            say(self._console, f"Gold not usable: {len(pl_module.bad_gold) - 10:,} more rows", style="yellow")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Show two rollouts of the first step, and write the rollouts of every so many steps."""
        output, step = pl_module.last_output, pl_module.rollout_step
        if output is None or not hasattr(pl_module, "parts"):
            return
        if not self._shown and trainer.is_global_zero:
            show_rollouts(output, pl_module.tokenizer, self._console)
        if self.rollouts_every and (not self._shown or step % self.rollouts_every == 0):
            self._write_rollouts(trainer, pl_module)
        self._shown = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write what the student answered to each problem."""
        if trainer.sanity_checking or is_dry_run(trainer):
            return
        for name in [s.name for s in pl_module.prompt_data.val]:
            results = gather_results(pl_module.last_results.get(name, []))
            if trainer.is_global_zero:
                write_results(self._folder(trainer) / "eval" / f"{name}.jsonl", results, step=pl_module.rollout_step)

    on_test_end = on_validation_end
    on_predict_end = on_validation_end

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the last rollouts and the plots."""
        if is_dry_run(trainer):
            return
        if self.rollouts_every and pl_module.last_output is not None and hasattr(pl_module, "parts"):
            self._write_rollouts(trainer, pl_module)
        if trainer.is_global_zero:
            self._plots(trainer)
            self._ended = True

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Say the last line, when every other callback has done its work."""
        if self._ended:
            self._ended = False
            self.say_last_line(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Keep the plots of what was reached, and say where it is."""
        refused = pl_module.rollout_step == 0 and getattr(exception, "exit_code", 1) == 2
        if trainer.is_global_zero and trainer.state.fn == "fit" and not is_dry_run(trainer) and not refused:
            self._plots(trainer)
            self.say_last_line(trainer, pl_module, stopped=type(exception).__name__)

    def say_last_line(self, trainer: pl.Trainer, pl_module: Any, stopped: str | None = None) -> None:
        """Print what was reached and where it is: the last line of a run."""
        run = RunFolder(self._folder(trainer))
        rows = read_metrics(run.metrics_csv) if run.metrics_csv.exists() else ()
        named = [f"val/{s.name}/pass@1" for s in pl_module.prompt_data.val] + ["train/reward", "train/cross_entropy"]
        modes: dict[str, Literal["max", "min"]] = {"train/cross_entropy": "min"}
        found = (summarize_metric(rows, name, mode=modes.get(name, "max")) for name in named)
        summary = next((s for s in found if s is not None), None)
        text = last_line(
            run_folder=str(run.path),
            seconds=time.monotonic() - self._started,
            steps=pl_module.rollout_step,
            summary=summary,
            student_folder=str(run.student) if stopped is None and run.student.is_dir() else None,
            stopped=stopped,
        )
        say(self._console, text, style="bold")

    def _write_rollouts(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = pl_module.rollout_step
        if step != self._written and not is_dry_run(trainer):
            folder, rank = self._folder(trainer) / "rollouts", trainer.global_rank
            write_rollouts(
                folder, pl_module.last_output, pl_module.tokenizer, step, limit=self.rollouts_limit, rank=rank
            )
            self._written = step

    def _plots(self, trainer: pl.Trainer) -> None:
        run = RunFolder(self._folder(trainer))
        if not run.metrics_csv.exists():
            return
        if can_draw():
            from distillkit.reporting.plots import write_plots

            write_plots(run.metrics_csv, run.plots)
        else:
            later = f"{INSTALL} && distillkit plot {run.path}"
            say(self._console, f"No curves are drawn, as matplotlib is not installed. For them: {later}")

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir)


def _facts(trainer: pl.Trainer, module: Any) -> RunFacts:
    parts, settings, data = module.parts, module.settings, module.prompt_data
    objective = parts.objective
    drops = ("dropped_too_long", "dropped_completion_too_long")
    words = {"dropped_too_long": "prompt too long", "dropped_completion_too_long": "completion too long"}
    return RunFacts(
        sampler=_name(parts.sampler) or "",
        settings=parts.sampler.settings,
        prompts_per_step=data.prompts_per_step,
        rewards=[(_name(reward) or "", reward.weight) for reward in parts.rewards],
        teacher=_scorer(parts.teacher),
        reference=_scorer(parts.reference),
        masker=_name(parts.masker),
        objective=_name(objective),
        objective_settings=None if objective is None else f"{objective.aggregation} mean",
        divergence=_term(parts.divergence, parts.beta),
        distill_through=settings.distill_through,
        reference_divergence=_term(parts.reference_divergence, parts.reference_beta),
        rows=[
            RowFacts(source=f"{r.name} ({r.path})", kept=r.kept, dropped={words[d]: getattr(r, d) for d in drops})
            for r in data.reports
        ],
        max_prompt_tokens=max((r.longest_prompt for r in data.reports), default=None),
        student=module.student,
        student_parameters=module.student_parameters,
        device=str(module.student_info.device),
        precision=str(trainer.precision),
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        run_folder=trainer.default_root_dir,
    )


def _name(part: Component | None) -> str | None:
    return None if part is None else name_of(type(part))


def _term(divergence: Component | None, beta: BetaScheduler | None) -> TermFacts | None:
    if divergence is None or beta is None:
        return None
    value, name = beta.value(0, {}), name_of(type(beta))
    weight = f"{value:g}" if name == "constant" else f"{value:g} ({name})"
    return TermFacts(name=name_of(type(divergence)), weight=weight)


def _scorer(part: TeacherScorer | None) -> ScorerFacts | None:
    if part is None:
        return None
    model = getattr(part, "_model", None)
    parameters = sum(p.numel() for p in model.parameters()) if model is not None else None
    return ScorerFacts(name=name_of(type(part)), source=getattr(part, "path", None), parameters=parameters)
