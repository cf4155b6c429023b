"""LightningCLI on a recipe: canonical config, run folder, and the rules of a distillkit run.

To adapt a command, override a hook of `DistillCLI`: `refused` (config rules), `loggers`, `callbacks`, `plugins` (what
the trainer gets beside the user's own), `facts` (environment.json).
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from distillkit.cli import listing
from distillkit.cli.arguments import dump, slots
from distillkit.cli.canonical import Canonical, canonical, json_ready, slots_of
from distillkit.cli.environment import describe
from distillkit.cli.launch import Launch, agree, global_rank, plan
from distillkit.cli.recipe import read_recipe, recipe_text
from distillkit.cli.run_record import RunRecord, check_csv_logger
from distillkit.cli.yaml_file import dump_yaml, load_yaml, plain
from distillkit.errors import ConfigError, DistillkitError, problem
from distillkit.reporting.metrics import MetricsCSV
from distillkit.reporting.run_folder import RunFolder, atomic_write_text
from distillkit.runs import TRAINER_DEFAULTS, quiet, run_callbacks
from distillkit.training.base import StudentModule
from distillkit.training.checkpoints import AtomicCheckpointIO
from distillkit.training.rank_watch import explained

__all__ = ["DistillCLI", "RunInterrupted"]

DEFAULT_SEED = 1

_PER_CALL = ("config", "ckpt_path", "weights_only", "verbose", "return_predictions")
"""Options of one call that `config.yaml` leaves out: it is then valid for every subcommand."""


class RunInterrupted(Exception):
    """A run that the user or the system stopped; the text says how to go on."""


class DistillCLI(LightningCLI):
    """Runs `distillkit fit | validate | test | predict`.

    `model` takes the arguments of `model_class` directly; with a `class_path` of another module, that module's.

    Args:
        argv: the subcommand and its arguments.
        model_class: the default module.
        data_class: the default data module.

    Raises:
        ConfigError: every problem of names, kinds and arguments, at once, before any model is loaded.
        RunInterrupted: Ctrl-C or SIGTERM.
    """

    folder: RunFolder
    launch: Launch | None = None
    canonical: Mapping[str, Any]

    def __init__(
        self,
        argv: Sequence[str],
        *,
        model_class: type[pl.LightningModule],
        data_class: type[pl.LightningDataModule],
    ) -> None:
        self.command = argv[0]
        self.default_model = model_class
        self.recipe = read_recipe(self.command, argv[1:], lambda tree: slots_of(tree, model_class))
        chosen, arguments = Canonical(model_class, data_class, {}), [*self.recipe.flags]
        _answer_slot_help(self.recipe.flags, model_class)
        if not any(_asks_for_help(flag) for flag in self.recipe.flags):
            chosen = canonical(
                self.recipe, self.command, default_model=model_class, default_data=data_class, refused=self.refused
            )
            arguments.insert(0, f"--config={json.dumps(json_ready(chosen.tree))}")
        options: dict[str, Any] = {"exit_on_error": False, "prog": "distillkit", "description": "Train and evaluate."}
        _obey_sigterm(at_once=True)
        quiet()
        try:
            super().__init__(
                model_class=chosen.model,
                datamodule_class=chosen.data,
                save_config_callback=None,
                seed_everything_default=DEFAULT_SEED,
                trainer_defaults=TRAINER_DEFAULTS,
                parser_kwargs=options | {self.command: {"exit_on_error": False}},
                subclass_mode_model=chosen.model is not model_class,
                subclass_mode_data=chosen.data is not data_class,
                auto_configure_optimizers=False,
                args=[self.command, *arguments],
            )
        except BaseException as error:
            cause = explained(error, getattr(self, "trainer", None))
            self._end(cause)
            if cause is not error:
                raise cause from error
            raise
        finally:
            _obey_sigterm(at_once=False)

    # ---- what a run of distillkit adds to Lightning's trainer: override these

    def refused(self, model_class: type[pl.LightningModule], trainer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield (key, error text) for trainer settings that cannot be honoured; `trainer` is what the user wrote."""
        if not issubclass(model_class, (self.default_model, StudentModule)):
            return
        clip, accumulate, epochs = (
            plain(trainer.get(key)) for key in ("gradient_clip_val", "accumulate_grad_batches", "max_epochs")
        )
        if clip is not None:
            yield (
                "gradient_clip_val",
                problem("distillkit clips the gradient itself", got=clip, hint=f"model.max_grad_norm: {clip}"),
            )
        if accumulate not in (None, 1):
            hint = "model.tokens_per_micro_batch for memory, model.minibatches for updates per step"
            what = "an update is split by tokens, not by batches"
            yield "accumulate_grad_batches", problem(what, got=accumulate, expected="1", hint=hint)
        if epochs not in (None, -1):
            hint = "trainer.max_steps: the number of rollout steps"
            yield "max_epochs", problem("distillkit counts rollout steps, not epochs", got=epochs, hint=hint)
        ends = [plain(trainer.get(key)) for key in ("max_steps", "max_time", "fast_dev_run")]
        budget = any("TokenBudget" in str(callback) for callback in _as_list(plain(trainer.get("callbacks"))))
        if self.command == "fit" and ends[0] in (None, -1) and not any(ends[1:]) and not budget:
            hint = "trainer.max_steps: 100"
            yield "max_steps", problem("how long to train is not said", expected="a number of steps", hint=hint)

    def loggers(self, given: Any) -> list[Logger]:
        """Return the trainer's loggers: `metrics.csv`, then the user's; `true` is TensorBoard in the run folder."""
        own: list[Logger] = [MetricsCSV(folder=self.folder.path)]
        if given is True:
            return [*own, TensorBoardLogger(save_dir=self.folder.path, name="tensorboard", version="")]
        chosen: list[Logger] = [] if given is False else _as_list(given)
        for logger in chosen:
            if isinstance(logger, CSVLogger):
                check_csv_logger(logger, self.folder)
        return [*own, *chosen]

    def callbacks(self, given: Sequence[Callback]) -> list[Callback]:
        """Return the callbacks a run gets beside the user's, who may bring one of these with other settings."""
        bar = self.config[self.command].trainer.enable_progress_bar is not False and not _has(given, ProgressBar)
        own = [c for c in run_callbacks() if not _has(given, type(c)) and (bar or not isinstance(c, ProgressBar))]
        return [RunRecord(self.folder), *own]

    def plugins(self, given: Sequence[Any]) -> list[Any]:
        """Return the plugins a run gets beside the user's: checkpoints are written atomically."""
        strategy = str(self.config[self.command].trainer.strategy)
        sharded = any(word in strategy.lower() for word in ("deepspeed", "fsdp", "modelparallel"))
        return [] if sharded or _has(given, CheckpointIO) else [AtomicCheckpointIO()]

    def facts(self) -> dict[str, Any]:
        """Return what `environment.json` says when the run starts."""
        return describe(self.recipe.argv, self.canonical)

    # ---- Lightning's own hooks

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommand of this call alone: a parser for each of the four takes four times as long."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `run_dir`."""
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="folder of the run (default: runs/<config name>)"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the canonical config and settle the run folder."""
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except ArgumentError as error:
            raise ConfigError(problem("the config cannot be used", got=str(error))) from error
        chosen = self.config[self.command]
        self.canonical = self._canonical(parser)
        run_dir, ckpt_path = chosen.run_dir, chosen.ckpt_path
        self.launch = agree(
            lambda: plan(self.recipe.name, self.command, run_dir=run_dir, ckpt_path=ckpt_path, config=self.canonical),
            run_dir=run_dir,
            ckpt_path=ckpt_path,
        )
        self.folder = self.launch.folder
        chosen.ckpt_path = self.launch.ckpt_path
        if chosen.weights_only is None:
            chosen.weights_only = True
        if chosen.seed_everything is True and self.launch.continued:
            before, _ = load_yaml(self.folder.config_yaml.read_text(encoding="utf-8"), str(self.folder.config_yaml))
            chosen.seed_everything = before["seed_everything"]

    def _parse_ckpt_path(self) -> None:
        """Take the config from the user alone; Lightning would overwrite it with the checkpoint's hyperparameters."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer: the user's settings, and what every run gets."""
        given = self.config_init[self.command].trainer
        callbacks, plugins = _as_list(given.callbacks), _as_list(given.plugins)
        own: dict[str, Any] = {
            "default_root_dir": str(self.folder.path),
            "logger": self.loggers(given.logger),
            "callbacks": [*callbacks, *self.callbacks(callbacks)],
            "plugins": [*plugins, *self.plugins(plugins)] or None,
        }
        for callback in callbacks:
            if isinstance(callback, Checkpoint):
                own["enable_checkpointing"] = True
                if getattr(callback, "dirpath", "") is None:
                    callback.dirpath = str(self.folder.checkpoints)  # type: ignore[attr-defined]
        return super().instantiate_trainer(**(own | kwargs))

    def before_fit(self) -> None:
        """Write the run folder's first files and tell the module where it is."""
        assert self.launch is not None
        self.model.run_folder = self.folder
        _obey_sigterm(at_once=False)  # from here on Lightning obeys it, at the end of a step
        if global_rank() != 0:
            return
        if not self.launch.continued:
            self.folder.lock()
        self.folder.begin(self.recipe.name, self.command)
        atomic_write_text(self.folder.recipe_yaml, recipe_text(self.recipe, self.canonical))
        config = {**self.canonical, "seed_everything": self.config[self.command].seed_everything}
        atomic_write_text(self.folder.config_yaml, dump_yaml(config))
        facts = self.facts()
        if self.launch.continued:
            known = json.loads(self.folder.environment_json.read_text(encoding="utf-8"))
            facts = {"continued": [*known.get("continued", []), facts]}
        self.folder.record(facts)
        for note in self.launch.notes:
            print(note)
        if not self.launch.continued:
            print(f"run folder: {self.folder.path}")
        sys.stdout.flush()

    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Mark the run as finished, unless only its time was up."""
        timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
        timed_out = timer is not None and (left := timer.time_remaining()) is not None and left <= 0
        if global_rank() == 0:
            self.folder.end("stopped" if timed_out else "finished", "trainer.max_time" if timed_out else "")

    after_validate = after_test = after_predict = after_fit

    def _canonical(self, parser: LightningArgumentParser) -> dict[str, Any]:
        """The parsed config with every default, as `config.yaml` has it."""
        config, _ = load_yaml(dump(parser, self.config), "config")
        found = {key: value for key, value in config[self.command].items() if key not in _PER_CALL}
        first = ("seed_everything", "run_dir", "model", "data", "trainer")
        return {key: found[key] for key in first} | found | {"run_dir": None}

    def _end(self, error: BaseException) -> None:
        """Say in the run folder how the run ended, and turn an interruption into advice."""
        if self.launch is None or global_rank() != 0:
            return
        interrupted = isinstance(error, KeyboardInterrupt | SIGTERMException) or isinstance(
            error.__context__, KeyboardInterrupt
        )
        status = self.folder.status()
        refused = isinstance(error, DistillkitError) and error.exit_code == 2 and not self.launch.continued
        if status is None or refused:
            self.folder.discard()
        if (status := self.folder.status()) is not None and status.state == "running":
            self.folder.end("stopped" if interrupted else "failed", f"{type(error).__name__}: {error}".split("\n")[0])
        if interrupted:
            why = "SIGTERM" if isinstance(error, SIGTERMException) else "Ctrl-C"
            text = f"stopped by {why}"
            if status is not None and self.command == "fit":
                last = self.folder.last_ckpt
                text += f"; {self.folder.path} has " + (f"{last.name}" if last.exists() else "no checkpoint yet")
                text += ". The same command with --ckpt_path last goes on." if last.exists() else "."
            raise RunInterrupted(text) from error


def _obey_sigterm(*, at_once: bool) -> None:
    """Install our handler of SIGTERM where there is none, or take it away again; anybody else's is left alone."""
    if threading.current_thread() is not threading.main_thread():
        return
    ours, before = (_terminated, signal.SIG_DFL) if at_once else (signal.SIG_DFL, _terminated)
    if signal.getsignal(signal.SIGTERM) is before:
        signal.signal(signal.SIGTERM, ours)


def _terminated(number: int, frame: object) -> None:
    raise SIGTERMException


def _answer_slot_help(flags: Sequence[str], model_class: type[pl.LightningModule]) -> None:
    """Answer `--model.divergence.help [topk]`: jsonargparse knows classes only, not names."""
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        key, _, name = flag.partition("=")
        offered = slots(model_class).get(key.removeprefix("--model.").removesuffix(".help"), ())
        kind = next((slot.kind for slot in offered if slot.kind), None)
        if kind is not None and key.endswith(".help"):
            named = name or ("" if following.startswith("-") else following)
            raise SystemExit(listing.main([kind, named] if named else [kind]))


def _asks_for_help(flag: str) -> bool:
    return flag in ("-h", "--help") or flag.split("=")[0].endswith(".help")


def _has(items: Sequence[Any], kind: type[Any]) -> bool:
    return any(isinstance(item, kind) for item in items)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
