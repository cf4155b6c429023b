"""Another teacher's scores, kept in memory and on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.teachers._score_store import Entry, ScoreFiles, ScoreMemory
from distillkit.teachers._tokenizer import tokenizer_digest
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["CachedTeacher"]

_FIELDS = ("sampled", "topk_ids", "topk", "entropy")
_LOG = logging.getLogger(__name__)


class CachedTeacher(TeacherScorer):
    """Scores each rollout once: what another teacher said is stored under a digest of everything it depends on.

    The digest covers the teacher's identity, the tokenizer, the request (temperature included), the vocabulary limit,
    the token ids and which of them are scored. The entries used last are in memory; all are in safetensors files of one
    rollout each, which any number of processes may share, also when `max_disk_gib` makes them remove files. A file that
    does not read is scored again. `score` may be called from several threads where the teacher's may.

    Args:
        teacher: who scores what is not there yet.
        dir: folder of the cache; made when missing.
        max_memory_gib: of the entries in this process's memory (2^30 bytes); 0 keeps none.
        max_disk_gib: of all files in `dir`; those used longest ago are removed. n processes may exceed it by n/64. None
            has no bound.

    Raises:
        ConfigError: a bound that is not a number of at least 0 (on disk, above 0), or a teacher whose scores do not
            follow from the token ids (`mixture` by row).
        ScoringError: the folder cannot be made, or a file cannot be written.

    Whole distributions (`full`, `student_topk`) are not cached and not offered.
    """

    def __init__(
        self, *, teacher: TeacherScorer, dir: str, max_memory_gib: float = 1.0, max_disk_gib: float | None = None
    ) -> None:
        for name, value, ok in (
            ("max_memory_gib", max_memory_gib, 0 <= max_memory_gib < math.inf),
            ("max_disk_gib", max_disk_gib, max_disk_gib is None or 0 < max_disk_gib < math.inf),
        ):
            if not ok:
                expected = (
                    "a finite number, at least 0" if name == "max_memory_gib" else "a finite number above 0, or null"
                )
                raise ConfigError(problem(f"model.teacher.{name}", got=value, expected=expected))
        if teacher.reads_rows:
            where = "model.teacher.teacher: its scores depend on more than the token ids, which name them in the cache"
            hint = "the cache around each teacher of a mixture: teachers: {math: {name: cached, teacher: ...}}"
            raise ConfigError(problem(where, got=type(teacher).__name__, hint=hint))
        self.teacher = teacher
        self.dir = dir
        self.max_memory_gib = max_memory_gib
        self.max_disk_gib = max_disk_gib
        self._facts: tuple[Any, ...] = ()
        self._counts = {"memory": 0, "disk": 0, "scored": 0}
        self._stores: tuple[ScoreMemory, ScoreFiles, threading.Lock] | None = None

    @property
    def offers(self) -> ScoreRequest:
        return replace(self.teacher.offers, full=False, student_topk=0)

    @property
    def vocab_size(self) -> int | None:
        return self.teacher.vocab_size

    @property
    def any_temperature(self) -> bool:
        return self.teacher.any_temperature

    @property
    def counts(self) -> Mapping[str, int]:
        """Rollouts by where their scores came from: `memory`, `disk`, or `scored` by the teacher."""
        return dict(self._counts)

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        return self.teacher.check_rows(rows)

    def setup(self, student: StudentInfo) -> None:
        disk = None if self.max_disk_gib is None else int(self.max_disk_gib * 2**30)
        files = ScoreFiles(Path(self.dir), disk)
        self.teacher.setup(student)
        self._facts = (self.identity(), tokenizer_digest(student.tokenizer), student.vocab_limit)
        self._stores = ScoreMemory(int(self.max_memory_gib * 2**30)), files, threading.Lock()

    def teardown(self) -> None:
        if any(self._counts.values()):
            told = ", ".join(f"{count:,} from {place}" for place, count in self._counts.items() if place != "scored")
            _LOG.info("%s: %s, %s scored by the teacher", self.dir, told, f"{self._counts['scored']:,}")
        self._stores = None
        self.teacher.teardown()

    def identity(self) -> str:
        return self.teacher.identity()

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        if self._stores is None:
            hint = "call setup(student) first"
            raise ScoringError(problem("CachedTeacher.score", got="called before setup", hint=hint))
        memory, files, lock = self._stores
        keys = self._keys(rollouts, request)
        known: dict[str, Entry] = {}
        counts = dict.fromkeys(self._counts, 0)
        missing: dict[str, int] = {}
        for i, key in enumerate(keys):
            place = "memory"
            if key not in known and key not in missing and (entry := memory.get(key)) is not None:
                known[key] = entry
            elif key not in known and key not in missing:
                place, entry = "disk", files.get(key)
                if entry is None:
                    place, missing[key] = "scored", i
                else:
                    known[key] = entry
                    memory.put(key, entry)
            counts[place] += 1
        if missing:
            for key, entry in zip(missing, self._fresh(rollouts, list(missing.values()), request), strict=True):
                known[key] = entry
                memory.put(key, entry)
                files.put(key, entry)
            files.trim()
        with lock:
            self._counts = {place: count + counts[place] for place, count in self._counts.items()}
        return _pad([known[key] for key in keys], rollouts)

    def _fresh(self, rollouts: RolloutBatch, rows: list[int], request: ScoreRequest) -> list[Entry]:
        """What the teacher says about the rollouts at `rows`."""
        fresh = rollouts.select(torch.tensor(rows, device=rollouts.tokens.device))
        scores = self.teacher.score(fresh, request)
        grids = {"valid": scores.valid} | {name: getattr(scores, name) for name in _FIELDS}
        there = {name: grid.cpu() for name, grid in grids.items() if grid is not None}
        lengths = fresh.lengths.tolist()
        # Cloned: a view would keep the whole batch in memory.
        return [{name: grid[i, :end].clone() for name, grid in there.items()} for i, end in enumerate(lengths)]

    def _keys(self, rollouts: RolloutBatch, request: ScoreRequest) -> list[str]:
        head = hashlib.sha256(json.dumps([*self._facts, repr(request)]).encode())
        tokens, mask, lengths = rollouts.tokens.cpu(), rollouts.loss_mask.cpu(), rollouts.lengths.tolist()
        keys = []
        for i, end in enumerate(lengths):
            digest = head.copy()
            digest.update(tokens[i, :end].numpy().astype("<i8").tobytes())
            digest.update(mask[i, :end].numpy().tobytes())
            keys.append(digest.hexdigest())
        return keys


def _pad(entries: Sequence[Entry], rollouts: RolloutBatch) -> TeacherScores:
    device, shape = rollouts.tokens.device, rollouts.tokens.shape
    grids: dict[str, Tensor] = {}
    for name in entries[0]:
        if all(name in entry for entry in entries):
            first = entries[0][name]
            grid = first.new_zeros(*shape, *first.shape[1:])
            for i, entry in enumerate(entries):
                grid[i, : len(entry[name])] = entry[name]
            grids[name] = grid.to(device)
    return TeacherScores(valid=grids.pop("valid"), **grids)  # type: ignore[arg-type]
