"""Every exception distillkit raises on purpose.

    DistillkitError
    ├── ConfigError(ValueError)            a config, recipe or argument that cannot run     exit 2
    │   ├── UnknownComponentError(LookupError)   a name no slot knows
    │   └── PluginLoadError(ImportError)         an installed plugin that does not import
    ├── DataError(ValueError)              a data file, row or column that cannot be used   exit 2
    ├── ModelError(ValueError)             a checkpoint or tokenizer that does not fit      exit 2
    ├── ShapeError(ValueError)             a tensor of the wrong shape or dtype
    ├── ContractError(TypeError)           a component that breaks its slot's contract
    ├── RolloutError(RuntimeError)         the sampler or a recorded rollout failed         exit 1
    ├── ScoringError(RuntimeError)         a teacher, reference or cache that cannot score  exit 1
    └── TrainingStopped(RuntimeError)      the run ended itself (too many non-finite losses) exit 1

A message says where it happened, what came, what was expected and what to try: build it with `problem`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "ContractError",
    "DataError",
    "DistillkitError",
    "ModelError",
    "PluginLoadError",
    "RolloutError",
    "ScoringError",
    "ShapeError",
    "TrainingStopped",
    "UnknownComponentError",
    "did_you_mean",
    "problem",
]


class DistillkitError(Exception):
    """Root of every error that distillkit raises on purpose."""

    exit_code = 1


class ConfigError(DistillkitError, ValueError):
    """A config, recipe or constructor argument that cannot run."""

    exit_code = 2


class UnknownComponentError(ConfigError, LookupError):
    """A component name that no slot knows."""


class PluginLoadError(ConfigError, ImportError):
    """An installed plugin whose component does not import."""


class DataError(DistillkitError, ValueError):
    """A data file, row or column that cannot be used."""

    exit_code = 2


class ModelError(DistillkitError, ValueError):
    """A checkpoint, tokenizer or architecture that does not fit the run."""

    exit_code = 2


class ShapeError(DistillkitError, ValueError):
    """A tensor of the wrong shape or dtype."""


class ContractError(DistillkitError, TypeError):
    """A component that breaks the contract of its slot."""


class RolloutError(DistillkitError, RuntimeError):
    """The sampler failed, or a recorded rollout does not fit its prompt."""


class ScoringError(DistillkitError, RuntimeError):
    """A teacher, reference or score cache that cannot score the rollouts."""


class TrainingStopped(DistillkitError, RuntimeError):
    """The run stopped itself; the last good checkpoint is kept."""


def problem(where: str, *, got: object = None, expected: object = None, hint: str | None = None) -> str:
    """Return one error text in the form every distillkit message has.

    Args:
        where: YAML path, file and row, or argument, and what is wrong there.
        got: what came; left out when None.
        expected: what would have been accepted; left out when None.
        hint: the nearest right thing to do.

    Example:
        >>> print(problem("model.divergence: unknown divergence", got="'topkk'", hint="topk"))
        model.divergence: unknown divergence
            got:      'topkk'
            try:      topk
    """
    lines = [where]
    for label, text in (("got", got), ("expected", expected), ("try", hint)):
        if text is not None:
            lines.append(f"    {label + ':':<9} {text}")
    return "\n".join(lines)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return the known name nearest to `name`, or None.

    Example:
        >>> did_you_mean("topkk", ["k1", "topk"])
        'topk'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return near[0] if near else None
