"""`metrics.csv`: one row per step, in step order, complete after a kill at any moment."""

from __future__ import annotations

import csv
import io
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from distillkit.errors import ContractError, DataError, problem
from distillkit.reporting.files import shortest, write_atomically

__all__ = ["MetricSummary", "MetricsCSV", "MetricsRow", "read_metrics", "summarize_metric"]

_Cells = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """One row of `metrics.csv`: the metrics logged at `step`; a metric that was not logged then is absent."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MetricSummary:
    """A metric over a run: its first, last and best finite value, and the step of each."""

    name: str
    first: float
    first_step: int
    last: float
    last_step: int
    best: float
    best_step: int


class MetricsCSV(Logger):
    """Append metrics to `<folder>/metrics.csv`; an existing file is continued, never deleted.

    Every `log_metrics` is on the disk when it returns. Metrics of the same step share one row (train, then validation;
    a repeated name takes the later value); rows are in step order. A new name becomes a new column: the file is then
    replaced as a whole, atomically. An empty cell is "not logged", `nan` and `inf` are values; float32 values have
    their shortest exact form. The last line, half-written when the process was killed, is dropped when the file is
    opened. Only rank 0 writes.

    Args:
        folder: the run folder.

    Raises:
        ContractError: a metric is no number, or its name has a line break.
        DataError: the file there is no `metrics.csv` of a run.

    Example:
        >>> import tempfile
        >>> run = tempfile.mkdtemp()
        >>> logger = MetricsCSV(folder=run)
        >>> logger.log_metrics({"train/reward": 0.5}, step=1)
        >>> logger.log_metrics({"val/held_out/pass@1": 0.25}, step=1)
        >>> print((Path(run) / "metrics.csv").read_text().strip())
        step,train/reward,val/held_out/pass@1
        1,0.5,0.25
    """

    def __init__(self, *, folder: str | Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._opened = False
        self._columns: list[str] = []
        self._last: tuple[int, _Cells] | None = None
        self._last_start = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder / "metrics.csv"

    @property
    def name(self) -> str:
        """Empty: with an empty `version`, Lightning puts `checkpoints/` straight into the run folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty, see `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @property
    def root_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder has the whole config as `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write the metrics of `step` (by default, one after the last row's); None values are left out."""
        cells = {name: _cell(name, value) for name, value in metrics.items() if value is not None and name != "step"}
        if not cells:
            return
        self._open()
        last_step = -1 if self._last is None else self._last[0]
        number = last_step + 1 if step is None else int(step)
        if number < 0:
            raise ContractError(problem("metrics.csv: step", got=number, expected="at least 0"))
        opened, self._opened = self._opened, False  # a write that fails leaves the file to be read and repaired again
        if any(name not in self._columns for name in cells) or number < last_step:
            self._insert(number, cells)
        elif self._last is not None and number == last_step:
            self._replace_last({**self._last[1], **cells})
        else:
            self._append(number, cells)
        self._opened = opened

    @rank_zero_only
    def rewind(self, step: int) -> int:
        """Drop the rows after `step`, which a run resumed from that step's checkpoint computes again.

        The file is replaced atomically. The dropped rows are kept beside it, as `metrics.rewound-1.csv`, `-2`, ...

        Returns:
            How many rows were dropped.
        """
        self._opened = False
        if not self.path.exists():
            return 0
        columns, rows = _load(self.path)
        kept = [row for row in rows if row[0] <= step]
        dropped = rows[len(kept) :]
        if dropped:
            number = 1
            while (aside := self._folder / f"metrics.rewound-{number}.csv").exists():
                number += 1
            write_atomically(aside, _render(columns, dropped))
            write_atomically(self.path, _render(columns, kept))
        return len(dropped)

    def _open(self) -> None:
        if self._opened:
            return
        self._columns, self._last, self._last_start = [], None, 0
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            self._columns, rows = _load(self.path)
            if whole < len(data):
                os.truncate(self.path, whole)
            if rows:
                self._last = rows[-1]
                self._last_start = data.rfind(b"\n", 0, whole - 1) + 1
        self._opened = True

    def _append(self, step: int, cells: _Cells) -> None:
        self._last_start = self.path.stat().st_size
        with self.path.open("ab") as file:
            file.write(_line([str(step), *(cells.get(name, "") for name in self._columns)]))
            file.flush()
            os.fsync(file.fileno())
        self._last = (step, cells)

    def _replace_last(self, cells: _Cells) -> None:
        assert self._last is not None
        step, _ = self._last
        with self.path.open("rb") as file:
            head = file.read(self._last_start)
        write_atomically(self.path, head + _line([str(step), *(cells.get(name, "") for name in self._columns)]))
        self._last = (step, cells)

    def _insert(self, step: int, cells: _Cells) -> None:
        rows = dict(_load(self.path)[1]) if self.path.exists() else {}
        rows[step] = {**rows.get(step, {}), **cells}
        self._columns += [name for name in cells if name not in self._columns]
        ordered = sorted(rows.items())
        data = _render(self._columns, ordered)
        write_atomically(self.path, data)
        self._last = ordered[-1]
        self._last_start = data.rfind(b"\n", 0, len(data) - 1) + 1


def read_metrics(path: str | Path) -> tuple[MetricsRow, ...]:
    """Return the rows of a `metrics.csv`, also while a run writes it: an unfinished last line is left out.

    Raises:
        DataError: no such file, or it is no `metrics.csv` (line, got, expected).
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(problem(f"{file}: no such file", expected="the metrics.csv of a run folder"))
    _, rows = _load(file)
    return tuple(MetricsRow(step=step, values=_numbers(file, step, cells)) for step, cells in rows)


def summarize_metric(
    rows: Iterable[MetricsRow], name: str, *, mode: Literal["max", "min"] = "max"
) -> MetricSummary | None:
    """Return the first, last and best value of `name`, None when it was never logged as a finite number.

    Of equally good values the first is the best.
    """
    points = [(row.step, row.values[name]) for row in rows if math.isfinite(row.values.get(name, math.nan))]
    if not points:
        return None
    best = (max if mode == "max" else min)(points, key=lambda point: point[1])
    (first_step, first), (last_step, last) = points[0], points[-1]
    return MetricSummary(
        name=name,
        first=first,
        first_step=first_step,
        last=last,
        last_step=last_step,
        best=best[1],
        best_step=best[0],
    )


def _cell(name: str, value: object) -> str:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, int | float) or "\n" in name or "\r" in name:
        got = f"{name!r}: {value!r}"
        raise ContractError(problem("metrics.csv: a metric that cannot be written", got=got, expected="name: number"))
    return str(int(number)) if isinstance(number, int) else repr(shortest([number])[0])


def _line(cells: Iterable[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _render(columns: Iterable[str], rows: Iterable[tuple[int, _Cells]]) -> bytes:
    names = list(columns)
    lines = [_line(["step", *names])]
    lines += [_line([str(step), *(cells.get(name, "") for name in names)]) for step, cells in rows]
    return b"".join(lines)


def _load(path: Path) -> tuple[list[str], list[tuple[int, _Cells]]]:
    """Return the columns (without `step`) and the rows of every finished line."""
    data = path.read_bytes()
    if not data:
        return [], []
    text = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace")
    lines = list(csv.reader(io.StringIO(text, newline="")))
    header = lines[0] if lines else [data[:80].decode("utf-8", "replace")]
    if not lines or header[:1] != ["step"] or len(set(header)) != len(header):
        expected = "step,<metric>,... each name once"
        hint = "give the run another folder, or move this file away"
        raise DataError(problem(f"{path}:1: not a header", got=",".join(header), expected=expected, hint=hint))
    rows: list[tuple[int, _Cells]] = []
    for number, line in enumerate(lines[1:], start=2):
        before = rows[-1][0] if rows else None
        fits = len(line) == len(header) and line[0].isascii() and line[0].isdigit()
        if not fits or (before is not None and int(line[0]) <= before):
            after = "" if before is None else f", the step after {before}"
            expected = f"{len(header)} cells{after}"
            hint = "correct or delete the line"
            raise DataError(problem(f"{path}:{number}: not a row", got=",".join(line), expected=expected, hint=hint))
        cells = {name: cell for name, cell in zip(header[1:], line[1:], strict=True) if cell}
        rows.append((int(line[0]), cells))
    return header[1:], rows


def _numbers(path: Path, step: int, cells: _Cells) -> dict[str, float]:
    values = {}
    for name, cell in cells.items():
        try:
            values[name] = float(cell)
        except ValueError:
            raise DataError(problem(f"{path}: step {step}, {name}", got=cell, expected="a number")) from None
    return values
