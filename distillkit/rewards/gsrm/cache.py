"""Decompositions by content: each trace is taken apart once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

from distillkit.decomposition import Decomposition, DecompositionError, parse, render
from distillkit.errors import ScoringError, problem
from distillkit.rewards.gsrm.decomposer import Decomposer, Item, Undecided

__all__ = ["DecompositionFiles", "Decompositions", "Recent"]

Result = Decomposition | Undecided

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values used last, at most `size` of them.

    Example:
        >>> recent = Recent(2)
        >>> for key in "aba": recent[key] = key.upper()
        >>> recent["c"] = "C"
        >>> recent.get("a"), recent.get("b")
        ('A', None)
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """Return the value of a key, None where it is not there (any more)."""
        value = self._kept.get(key)
        if value is not None:
            self._kept.move_to_end(key)
        return value

    def __setitem__(self, key: K, value: V) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def __len__(self) -> int:
        return len(self._kept)


class DecompositionFiles:
    """Decompositions on disk, one small text file each, in the grammar of `distillkit.decomposition`.

    The file name is a digest of the decomposer's identity, the problem and the trace. Files are written under another
    name and renamed, so processes may share the folder; a file that does not read is as good as none.

    Args:
        folder: of the cache; made when missing.
        identity: of the decomposer.

    Raises:
        ScoringError: the folder cannot be made, or a file cannot be written.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = "model.rewards: gsrm.cache_dir: cannot make the folder"
            raise ScoringError(problem(where, got=f"{folder} ({error})")) from error

    def get(self, item: Item) -> Decomposition | None:
        """Return the decomposition of an item, None where there is none."""
        try:
            return parse(self._file(item).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, DecompositionError):
            return None

    def put(self, item: Item, decomposition: Decomposition) -> None:
        """Keep the decomposition of an item."""
        file = self._file(item)
        try:
            file.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(render(decomposition) + "\n")
            os.replace(temporary, file)
        except OSError as error:
            where = "model.rewards: gsrm.cache_dir: cannot write"
            raise ScoringError(problem(where, got=f"{file} ({error})", hint="free disk space, or null")) from error

    def _file(self, item: Item) -> Path:
        key = hashlib.sha256(json.dumps([self._identity, *item]).encode()).hexdigest()
        return self._folder / key[:2] / f"{key}.txt"


class Decompositions:
    """What a decomposer makes of traces, each asked for once.

    Traces of students pass: the latest are kept in memory. Those of teachers come back every epoch: they are kept in
    memory in larger number, and on disk. What is undecided but may be decided when asked again (a server was down) is
    not kept; what stays undecided is kept in memory only.

    Args:
        decomposer: set up by the caller.
        folder: of the files; None keeps none.
        students: traces of students in memory.
        teachers: traces of teachers in memory.
    """

    def __init__(
        self, decomposer: Decomposer, folder: Path | None, *, students: int = 8192, teachers: int = 131_072
    ) -> None:
        self._decomposer = decomposer
        self._files = None if folder is None else DecompositionFiles(folder, decomposer.identity())
        self._students: Recent[Item, Result] = Recent(students)
        self._teachers: Recent[Item, Result] = Recent(teachers)

    def of(self, students: Iterable[Item], teachers: Iterable[Item]) -> dict[Item, Result]:
        """Return the result of every item; those that are not known yet are decomposed in one call."""
        lasting = dict.fromkeys(teachers)
        wanted = dict.fromkeys((*lasting, *students))
        known: dict[Item, Result] = {}
        kept: set[Item] = set()
        for item in wanted:
            result: Result | None = self._teachers.get(item)
            if result is None and item in lasting and self._files is not None:
                result = self._files.get(item)
            if result is not None:
                kept.add(item)
            else:
                result = self._students.get(item)
            if result is not None:
                known[item] = result
        missing = [item for item in wanted if item not in known]
        fresh = dict(zip(missing, self._decomposer.decompose(missing) if missing else (), strict=True))
        for item, result in {**known, **fresh}.items():
            if isinstance(result, Undecided) and not result.lasting:
                continue
            (self._teachers if item in lasting else self._students)[item] = result
            if item in lasting and item not in kept and self._files is not None and isinstance(result, Decomposition):
                self._files.put(item, result)
        return {**known, **fresh}
