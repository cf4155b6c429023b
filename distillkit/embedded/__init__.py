"""The embedded default: a task, a tokenizer, a teacher and a student that need no network and no GPU.

    arithmetic.py    step-by-step arithmetic modulo 10: problems, reference chains, legal steps, check of a chain
    tokenizer.py     the character tokenizer of both models
    teacher/         Qwen3, 0.80 M parameters, solves the task          `embedded:teacher`
    student/         Qwen3, 0.42 M parameters, learned from careless writers `embedded:student`
    careless.py      the corpus of those writers
    decomposer/      Qwen3, takes a chain apart into its reasoning steps `embedded:decomposer`
    decompositions.py, corruptions.py, decomposer_tokenizer.py    what it learned, by rule, and how it reads and writes

`configs/embedded_teacher.yaml`, `configs/embedded_student.yaml` and `configs/embedded_decomposer.yaml` make the models
again.

Datasets: `embedded:arithmetic/train`, `embedded:arithmetic/careless` (the student's corpus),
`embedded:arithmetic/validation` (300, to choose settings on) and `embedded:arithmetic/held_out` (500) have rows with
`prompt`, `answer`, `chain` (a reference trace) and `operands`. `embedded:arithmetic/decompositions` (the decomposer's
corpus) has `prompt` (messages), `completion`, `problem`, `trace` and `kind`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distillkit.embedded.arithmetic import Row, generate, held_out, validation
from distillkit.embedded.careless import careless_rows
from distillkit.embedded.decompositions import DecompositionRow, decomposition_rows
from distillkit.errors import ConfigError, did_you_mean, problem

__all__ = ["DATASETS", "DECOMPOSITION_ROWS", "MODELS", "TRAIN_ROWS", "is_embedded", "resolve", "rows"]

PREFIX = "embedded:"
TRAIN_ROWS = 40_960
DECOMPOSITION_ROWS = 102_400
_HERE = Path(__file__).parent

MODELS: dict[str, Path] = {f"{PREFIX}{name}": _HERE / name for name in ("teacher", "student", "decomposer")}
"""Name of each embedded model -> its folder."""


def _train() -> list[Row]:
    return generate("train", TRAIN_ROWS, distinct=False)


def _careless() -> list[Row]:
    return careless_rows(TRAIN_ROWS)


def _decompositions() -> list[DecompositionRow]:
    return decomposition_rows(DECOMPOSITION_ROWS)


DATASETS: dict[str, Callable[[], Sequence[Mapping[str, Any]]]] = {
    "embedded:arithmetic/train": _train,
    "embedded:arithmetic/careless": _careless,
    "embedded:arithmetic/decompositions": _decompositions,
    "embedded:arithmetic/validation": validation,
    "embedded:arithmetic/held_out": held_out,
}
"""Name of each embedded dataset -> the function that makes its rows."""


def is_embedded(name: object) -> bool:
    """Return whether a path or name is meant for this package.

    Example:
        >>> is_embedded("embedded:teacher"), is_embedded("Qwen/Qwen3-8B")
        (True, False)
    """
    return isinstance(name, str) and name.startswith(PREFIX)


def resolve(path_or_name: str | Path) -> str | Path:
    """Return the folder of an embedded model; any other path or name comes back as it is.

    Raises:
        ConfigError: an `embedded:` name that is no embedded model.

    Example:
        >>> resolve("embedded:teacher").name
        'teacher'
        >>> resolve("Qwen/Qwen3-8B")
        'Qwen/Qwen3-8B'
    """
    if not isinstance(path_or_name, str) or not is_embedded(path_or_name):
        return path_or_name
    if path_or_name not in MODELS:
        raise ConfigError(_unknown("model", path_or_name, MODELS))
    return MODELS[path_or_name]


def rows(name: str) -> Sequence[Mapping[str, Any]]:
    """Return the rows of an embedded dataset, the same at every call.

    Raises:
        ConfigError: not the name of an embedded dataset.

    Example:
        >>> len(rows("embedded:arithmetic/held_out"))
        500
    """
    if name not in DATASETS:
        raise ConfigError(_unknown("dataset", name, DATASETS))
    return DATASETS[name]()


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    return problem(
        f"embedded: unknown embedded {kind}",
        got=repr(name),
        expected=", ".join(names),
        hint=did_you_mean(name, names),
    )
