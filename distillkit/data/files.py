"""Read the rows of one file: JSONL, JSON, CSV, parquet.

Parquet goes through the `datasets` library. JSON and CSV go through Python's own parsers, so that values stay what the
file says (the library's JSON reader turns date-like text into timestamps, large integers into floats; its CSV reader
the text `NA` into nothing) and a bad line is named by its number. CSV cells are text.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distillkit.errors import DataError, problem

__all__ = ["READERS", "Row", "reason"]

Row = Mapping[str, Any]

_Rows = tuple[Sequence[Row], Sequence[int]]
_UNREADABLE = (ValueError, RecursionError)
_BOM = b"\xef\xbb\xbf"
_SHOWN = 60
_OBJECTS = "a list of JSON objects, or one object per line"


def _read_jsonl(file: Path, where: str) -> _Rows:
    return _parse_lines(file, file.read_bytes(), where)


def _parse_lines(file: Path, content: bytes, where: str) -> _Rows:
    rows: list[Row] = []
    numbers: list[int] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(content.removeprefix(_BOM).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except _UNREADABLE as error:
            bad.append((number, f"{reason(error)} in {_shorten(line.decode(errors='replace'))}"))
            continue
        if isinstance(value, dict):
            rows.append(value)
            numbers.append(number)
        else:
            bad.append((number, _name_value(value)))
    if bad:
        places = [f"line {n}" for n, _ in bad]
        raise _malformed(where, file, bad[0][1], "one JSON object per line", places)
    return rows, numbers


def _read_json(file: Path, where: str) -> _Rows:
    content = file.read_bytes()
    is_list = content.removeprefix(_BOM).lstrip().startswith(b"[")
    try:
        values = json.loads(content.decode("utf-8-sig")) if content.strip() else []
    except _UNREADABLE as error:
        if not is_list:
            return _parse_lines(file, content, where)
        places = [f"line {error.lineno}"] if isinstance(error, json.JSONDecodeError) else []
        raise _malformed(where, file, reason(error), _OBJECTS, places) from error
    values = values if isinstance(values, list) else [values]
    bad = [n for n, value in enumerate(values, start=1) if not isinstance(value, dict)]
    if bad:
        raise _malformed(where, file, _name_value(values[bad[0] - 1]), _OBJECTS, [f"row {n}" for n in bad])
    return values, range(1, len(values) + 1)


def _read_csv(file: Path, where: str) -> _Rows:
    expected = "a header line, then as many cells in every row"
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = [cells for cells in csv.reader(stream, strict=True) if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _malformed(where, file, reason(error), expected) from error
    header, body = (lines[0], lines[1:]) if lines else ([], [])
    bad = [n for n, cells in enumerate(body, start=1) if len(cells) != len(header)]
    if bad:
        cells = body[bad[0] - 1]
        got = f"{len(cells)} cells under {len(header)} headers: {_shorten(','.join(cells))}"
        raise _malformed(where, file, got, expected, [f"row {n}" for n in bad])
    return [dict(zip(header, cells, strict=True)) for cells in body], range(1, len(body) + 1)


def _read_parquet(file: Path, where: str) -> _Rows:
    from datasets import Dataset

    try:
        # Held in memory and built in a folder that goes: nothing is left in the user's cache, and ranks cannot collide.
        with tempfile.TemporaryDirectory() as folder, _quiet():
            rows = Dataset.from_parquet(str(file), cache_dir=folder, keep_in_memory=True)
    except Exception as error:
        raise _malformed(where, file, reason(error), "a parquet file") from error
    return rows, range(1, len(rows) + 1)


READERS: Mapping[str, Callable[[Path, str], _Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
"""Suffix -> reader of (file, YAML path for messages), which returns the rows and the number of each, counted from 1."""


def reason(error: Exception) -> str:
    """Return the first line of what went wrong underneath."""
    cause = error.__cause__ or error
    text = str(cause).strip()
    return text.splitlines()[0][:200] if text else type(cause).__name__


def _malformed(where: str, file: Path, got: str, expected: str, places: Sequence[str] = ()) -> DataError:
    first = f", {places[0]}" if places else ""
    others = f" (and {len(places) - 1} more: {', '.join(places[1:4])}{', …' * (len(places) > 4)})" if places[1:] else ""
    return DataError(problem(f"{where}: {file}{first}: malformed{others}", got=got, expected=expected))


def _name_value(value: object) -> str:
    return f"a {type(value).__name__}: {_shorten(json.dumps(value))}"


def _shorten(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets`: what fails is raised, and one file needs no bar."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    level = datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
