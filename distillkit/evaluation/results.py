"""What evaluation records about a problem: one line of `eval/<set>.jsonl`.

Schema, version 1. A line is one problem at one step; `null` is "not known".

| key | type | meaning |
|---|---|---|
| `schema_version` | int | 1 |
| `step` | int | rollout step whose weights answered |
| `set` | str | name of the evaluation set |
| `index` | int | row of the problem in its source, from 0 |
| `prompt` | str or messages | as given to the student, before the chat template |
| `gold` | any | the gold answer's column |
| `completions` | list | one entry per completion, below |

| key of a completion | type | meaning |
|---|---|---|
| `text` | str | decoded completion |
| `correct` | bool or null | null: could not be scored |
| `answer` | str or null | the extracted answer, in normal form; null: none found |
| `truncated` | bool | cut at the length limit |
| `length` | int | tokens, the end token included |
| `format_ok` | bool or null | see `FormatRate` |
| `rewards` | {name: number or null} | value of each reward |
| `status` | {name: str} | how each came about: scored, unparseable, not_applicable, timed_out, crashed, undecided |
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distillkit.errors import DataError, problem
from distillkit.types import Prompt

__all__ = ["SCHEMA_VERSION", "CompletionResult", "ProblemResult", "read_results", "write_results"]

SCHEMA_VERSION = 1

_LINE = re.compile(r'\{"schema_version": \d+, "step": (\d+),')


@dataclass(frozen=True, kw_only=True)
class CompletionResult:
    """One completion, judged; the fields are those of the file's schema."""

    text: str
    correct: bool | None
    answer: str | None
    truncated: bool
    length: int
    format_ok: bool | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    status: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """One problem with its completions. `valid` is False for a repeated problem that only fills up a rank's share."""

    set_name: str
    index: int
    prompt: Prompt
    gold: Any
    completions: tuple[CompletionResult, ...]
    valid: bool = True


def write_results(path: Path, results: Sequence[ProblemResult], *, step: int) -> None:
    """Put the results of `step` into the file; rows of other steps stay, those of the same step are replaced.

    So a run that was killed after an evaluation and repeats it neither loses nor doubles a row. The file is replaced as
    a whole: at any moment it is either the old one or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".tmp")
    with whole.open("w", encoding="utf-8") as stream:
        # The same step may only be there when a run repeats it, and later steps only then: keep the order of steps.
        later = []
        for line in _lines(path):
            line_step = _step(line, path)
            if line_step < step:
                stream.write(line)
            elif line_step > step:
                later.append(line)
        stream.writelines(_encode(result, step) for result in sorted(results, key=lambda r: r.index) if result.valid)
        stream.writelines(later)
        stream.flush()
        os.fsync(stream.fileno())
    whole.replace(path)


def read_results(path: Path) -> Iterator[tuple[int, ProblemResult]]:
    """Yield (step, result) for every line of a results file.

    Raises:
        DataError: a line of another schema version.
    """
    for line in _lines(path):
        row = json.loads(line)
        if row.get("schema_version") != SCHEMA_VERSION:
            got = f"schema_version {row.get('schema_version')}"
            raise DataError(problem(f"{path}: evaluation results", got=got, expected=SCHEMA_VERSION))
        completions = tuple(CompletionResult(**completion) for completion in row["completions"])
        prompt, gold = row["prompt"], row["gold"]
        result = ProblemResult(
            set_name=row["set"], index=row["index"], prompt=prompt, gold=gold, completions=completions
        )
        yield row["step"], result


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        with path.open(encoding="utf-8") as stream:
            yield from stream


def _step(line: str, path: Path) -> int:
    match = _LINE.match(line)
    if match is None:
        got = f"a line that starts {line[:60]!r}"
        raise DataError(problem(f"{path}: not a file of evaluation results", got=got, hint="move it away"))
    return int(match[1])


def _encode(result: ProblemResult, step: int) -> str:
    row = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "set": result.set_name,
        "index": result.index,
        "prompt": result.prompt,
        "gold": str(result.gold) if isinstance(result.gold, float) and not math.isfinite(result.gold) else result.gold,
        "completions": [asdict(completion) for completion in result.completions],
    }
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"
