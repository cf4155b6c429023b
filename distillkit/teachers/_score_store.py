"""Scores of single rollouts by key: the latest in memory, all of them in files, either within a bound."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from distillkit.errors import ScoringError, problem

__all__ = ["Entry", "ScoreFiles", "ScoreMemory"]

Entry = Mapping[str, Tensor]
"""Scores [T, ...] of one rollout by name, on the CPU."""

_SUFFIX = ".safetensors"
_LOCK = ".lock"
_STALE_S = 3600
"""Age in seconds at which a file that was being written is what a killed process left."""


class ScoreMemory:
    """The entries used last, of at most `bound` bytes together; safe to use from several threads.

    Example:
        >>> import torch
        >>> memory = ScoreMemory(8)
        >>> for key in ("a", "b", "a", "c"): memory.put(key, {"sampled": torch.ones(1)})
        >>> memory.get("a") is not None, memory.get("b") is not None
        (True, False)
    """

    def __init__(self, bound: int) -> None:
        self._bound, self._bytes = bound, 0
        self._kept: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Entry | None:
        """Return the entry of a key, None where it is not there (any more)."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry; one that is larger than the bound is not kept."""
        with self._lock:
            if (old := self._kept.pop(key, None)) is not None:
                self._bytes -= _bytes(old)
            self._kept[key] = entry
            self._bytes += _bytes(entry)
            while self._bytes > self._bound:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])


class ScoreFiles:
    """One safetensors file per entry under a folder that several processes may share.

    A file is written under another name and renamed, so that a reader finds all of it or nothing; one that does not
    read is as good as none. The time of a file is that of its last use. Where the folder has a bound, `trim` removes
    the files used longest ago, in one process at a time; the others read and write on meanwhile, and take a file that
    vanishes for one that was never there.

    Args:
        folder: made when missing.
        bound: bytes of all files; None has none. A process looks after each 1/64 of it that it has written, so that n
            processes may exceed it by n/64.

    Raises:
        ScoringError: the folder cannot be made, or a file cannot be written.
    """

    def __init__(self, folder: Path, bound: int | None = None) -> None:
        self._folder, self._bound = folder, bound
        self._lock = threading.Lock()
        self._unseen = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = "model.teacher.dir: cannot make the folder"
            raise ScoringError(problem(where, got=f"{folder} ({error})")) from error

    def get(self, key: str) -> Entry | None:
        """Return the entry of a key, None where there is none that reads."""
        file = self._file(key)
        try:
            entry = load(file.read_bytes())  # not mapped: a removed file would keep its place on disk
        except Exception:  # none, a damaged one, or one that another process is removing
            return None
        if self._bound is not None:
            with contextlib.suppress(OSError):
                os.utime(file)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry."""
        file, content = self._file(key), save(dict(entry))
        temporary: str | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            os.replace(temporary, file)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            where, hint = "model.teacher.dir: cannot write", "free disk space, or model.teacher.max_disk_gib"
            raise ScoringError(problem(where, got=f"{file} ({error})", hint=hint)) from error
        with self._lock:
            self._unseen += len(content)

    def trim(self) -> None:
        """Remove the files used longest ago, down to 15/16 of the bound, if there is more than the bound."""
        if self._bound is None:
            return
        with self._lock:
            if self._unseen * 64 < self._bound:
                return
            with self._alone() as alone:
                if not alone:
                    return  # another process does just this; the next call looks again
                self._unseen = 0
                files = sorted(self._files())
                total = sum(size for _, size, _ in files)
                if total <= self._bound:
                    return
                for _, size, path in files:
                    if total * 16 <= self._bound * 15:
                        return
                    with contextlib.suppress(FileNotFoundError):  # someone else removed it: its place is free too
                        os.unlink(path)
                    total -= size

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, size and path of every file; what killed processes left is removed on the way."""
        for folder in [entry.path for entry in os.scandir(self._folder) if entry.is_dir()]:
            for file in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    known = file.stat()
                    if file.name.endswith(_SUFFIX):
                        yield known.st_mtime, known.st_size, file.path
                    elif file.name.endswith(".tmp") and time.time() - known.st_mtime > _STALE_S:
                        os.unlink(file.path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold the folder's lock, or say that another process does; without locks in the system, nobody does."""
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            yield True
            return
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        except OSError:  # a file system without locks
            pass
        try:
            yield True
        finally:
            os.close(descriptor)

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{_SUFFIX}"


def _bytes(entry: Entry) -> int:
    return sum(value.numel() * value.element_size() for value in entry.values())
