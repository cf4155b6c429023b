"""A recipe as `distillkit fit` would read it, stopped before anything is loaded or written."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distillkit.cli.lightning import DistillCLI
from distillkit.errors import ConfigError, problem

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from argparse import Namespace as Options

    from lightning.pytorch.cli import ArgsType, LightningArgumentParser

__all__ = ["ParsedRecipe", "parse_recipe", "split"]


class ParsedRecipe(DistillCLI):
    """The command line up to the module and the data: constructors read no file and load no model.

    `model` and `datamodule` are built; there is no trainer and no run folder. `trainer_settings` are the recipe's.
    """

    @property
    def trainer_settings(self) -> Any:
        """The `trainer` section, every default spelled out."""
        return self.config[self.command].trainer

    @property
    def seed(self) -> int:
        """The run's seed."""
        value = self.config[self.command].seed_everything
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else 1

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the canonical config; no folder is settled."""
        from argparse import ArgumentError

        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except ArgumentError as error:
            raise ConfigError(problem("the config cannot be used", got=str(error))) from error

    def _set_seed(self) -> None:
        """Leave the random states alone."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make none."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def split(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the command's own options and the arguments of the recipe.

    Raises:
        ConfigError: no `--config`.
    """
    options, rest = parser.parse_known_args(list(argv))
    if not any(word in ("-c", "--config") or word.startswith("--config=") for word in rest):
        hint = f"{parser.prog} --config quickstart"
        raise ConfigError(problem(f"{parser.prog}: of which config?", expected="--config FILE", hint=hint))
    return options, rest


def parse_recipe(arguments: Sequence[str]) -> ParsedRecipe:
    """Build module and data of a recipe and its overrides.

    Raises:
        ConfigError: every problem of names, kinds and arguments, at once.
    """
    if (working_folder := os.getcwd()) not in sys.path:
        sys.path.append(working_folder)  # a part in a file beside the config
    from distillkit.data import PromptData
    from distillkit.training.on_policy import OnPolicyDistillation

    return ParsedRecipe(["fit", *arguments], model_class=OnPolicyDistillation, data_class=PromptData)
