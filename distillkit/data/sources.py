"""Where rows come from: files, a hub dataset, or the package's own task."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from distillkit.data.files import READERS, Row, reason
from distillkit.errors import ConfigError, DataError, did_you_mean, problem

__all__ = ["Chat", "DataSource", "Row", "SourceRows", "needs_download", "read_source"]

Chat = Literal["auto", "always", "never"]
"""When a prompt goes through the tokenizer's chat template; `auto`: when it is a list of messages."""

_KNOWN = "a .jsonl, .json, .parquet or .csv file, a hub dataset name, or embedded:<task>/<split>"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    r"""One set of rows and how a row becomes a prompt.

    Attributes:
        path: a JSONL, JSON, parquet or CSV file or several, a hub dataset name, or `embedded:<task>/<split>`. `~`,
            `$NAME`, `${NAME}` and `${NAME:-default}` are expanded.
        split: of a hub dataset, `train` by default.
        config_name: of a hub dataset.
        columns: our name -> their column, such as `{prompt: question, answer: answer}`. Their names stay usable too.
        template: the prompt as a Python format string over the columns, such as `"{question}\nAnswer:"`; without it
            the prompt is the column `prompt`, text or a list of messages.
        system_prompt: put before messages that have no system message of their own.
        chat: `auto` renders messages with the chat template and leaves text as it is; `always` makes text one user
            message; `never` refuses messages.
        limit: keep the first so many rows.
        chat_template_kwargs: passed to the chat template, such as `{enable_thinking: false}`.

    Example:
        >>> DataSource(path=["a.jsonl", "b.jsonl"], columns={"prompt": "question"}).paths
        ('a.jsonl', 'b.jsonl')
    """

    path: str | list[str]
    split: str | None = None
    config_name: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    system_prompt: str | None = None
    chat: Chat = "auto"
    limit: int | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """The path or paths, as given."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    def check(self, where: str) -> None:
        """Refuse settings that cannot work, without reading anything.

        Raises:
            ConfigError: no path, a limit below 1, or a system prompt that would not be used.
        """
        if not self.paths or not all(self.paths):
            raise ConfigError(problem(f"{where}.path: no path", got=repr(self.path), expected=_KNOWN))
        if self.limit is not None and self.limit < 1:
            raise ConfigError(problem(f"{where}.limit", got=self.limit, expected="at least 1, or null for all rows"))
        if self.system_prompt is not None and self.chat == "never":
            hint = f"set {where}.chat to always, or write the text into {where}.template"
            raise ConfigError(problem(f"{where}.system_prompt: not used with chat: never", got="both", hint=hint))


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one file or dataset; `numbers` are the line or row numbers that a person would count to."""

    name: str
    unit: str
    rows: Sequence[Row]
    numbers: Sequence[int]
    digest: str


class SourceRows(Sequence[Row]):
    """The rows of a source in order; each knows its file and line, the whole its columns and content hash.

    Attributes:
        name: the file or dataset; of several, the first and how many more.
        columns: every column name that occurs, in order of appearance.
        sha256: digest of the content, whatever its place.
    """

    def __init__(self, parts: Sequence[_Part], limit: int | None = None) -> None:
        self._parts = parts
        self.name = parts[0].name + (f" and {len(parts) - 1} more" if parts[1:] else "")
        self._ends = list(itertools.accumulate(len(part.rows) for part in parts))
        total = self._ends[-1] if self._ends else 0
        self._length = total if limit is None else min(limit, total)
        self.columns = tuple(dict.fromkeys(itertools.chain.from_iterable(_columns(part.rows) for part in parts)))
        self.sha256 = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, offset = self._locate(index)
        return part.rows[offset]

    def place(self, index: int) -> str:
        """Return where a row is, such as `train.jsonl, line 7`."""
        part, offset = self._locate(index)
        return f"{part.name}, {part.unit} {part.numbers[offset]}"

    def _locate(self, index: int) -> tuple[_Part, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        which = bisect.bisect_right(self._ends, index)
        return self._parts[which], index - (self._ends[which - 1] if which else 0)


def read_source(source: DataSource, where: str = "data.train") -> SourceRows:
    """Read every row of a source.

    Args:
        source: what to read.
        where: its YAML path, for messages.

    Raises:
        ConfigError: settings that cannot work.
        DataError: nothing there, not readable, malformed, or no rows.
    """
    source.check(where)
    rows = SourceRows([_read(path, source, where) for path in source.paths], source.limit)
    if not rows:
        raise DataError(problem(f"{where}: {rows.name}: no rows", got="0 rows", expected="at least one row"))
    return rows


def needs_download(source: DataSource, where: str) -> bool:
    """Return whether some of the source is on the hub (or in a local folder that `datasets` reads)."""
    return any(_kind(_expand(path, where)) == "hub" for path in source.paths)


def _read(path: str, source: DataSource, where: str) -> _Part:
    name = _expand(path, where)
    kind = _kind(name)
    if kind == "hub":
        return _read_hub(name, source, where)
    if setting := "split" if source.split else "config_name" if source.config_name else None:
        hint = f"remove {where}.{setting}"
        raise ConfigError(problem(f"{where}.{setting}: only a hub dataset has one", got=name, hint=hint))
    return _read_embedded(name, where) if kind == "embedded" else _read_file(Path(name), where)


def _kind(name: str) -> Literal["embedded", "file", "hub"]:
    if name.startswith("embedded:"):
        return "embedded"
    path = Path(name)
    if path.is_dir():
        return "hub"
    named_as_file = path.suffix.lower() in READERS or not _HUB_NAME.fullmatch(name)
    return "file" if path.is_file() or named_as_file else "hub"


def _expand(path: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        found = os.environ.get(name) or default
        if found is None:
            hint = f"export {name}=/folder/of/the/data, or give --{where}.path"
            raise DataError(problem(f"{where}.path: the environment variable {name} is not set", got=path, hint=hint))
        return found

    return os.path.expanduser(_VARIABLE.sub(value, path))


def _read_file(file: Path, where: str) -> _Part:
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        near = did_you_mean(file.name, siblings)
        hint = str(file.parent / near) if near else None
        raise DataError(problem(f"{where}: no such file", got=file, expected=_KNOWN, hint=hint))
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(problem(f"{where}: unknown kind of file", got=file, expected=" ".join(READERS)))
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    rows, numbers = reader(file, where)
    return _Part(str(file), "line" if file.suffix.lower() == ".jsonl" else "row", rows, numbers, digest)


def _read_hub(name: str, source: DataSource, where: str) -> _Part:
    from datasets import Dataset, load_dataset

    split = source.split or "train"
    try:
        rows = load_dataset(name, name=source.config_name, split=split)
    except Exception as error:
        got = f"{name}, split {split} ({reason(error)})"
        raise DataError(problem(f"{where}: cannot load this dataset", got=got, expected=_KNOWN)) from error
    assert isinstance(rows, Dataset)
    details = f"{source.config_name}, {split}" if source.config_name else split
    return _Part(f"{name} [{details}]", "row", rows, range(1, len(rows) + 1), _digest(rows))


def _read_embedded(name: str, where: str) -> _Part:
    from distillkit import embedded

    try:
        rows: Sequence[Row] = embedded.rows(name)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{where}.path: {error}") from error
    return _Part(name, "row", rows, range(1, len(rows) + 1), _digest(rows))


def _digest(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _columns(rows: Sequence[Row]) -> Iterator[str]:
    named = getattr(rows, "column_names", None)
    return iter(named) if named is not None else itertools.chain.from_iterable(rows)
