"""Another teacher's scores, kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.errors import ScoringError, problem
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["CachedTeacher"]

_FIELDS = ("sampled", "topk_ids", "topk", "entropy")


class CachedTeacher(TeacherScorer):
    """Scores each rollout once: what another teacher said is stored under a digest of everything it depends on.

    The digest covers the teacher's identity, the request (temperature included), the vocabulary limit, the token ids
    and which of them are scored. One safetensors file per rollout, written atomically, so processes may share the
    folder. A file that does not read is scored again.

    Args:
        teacher: who scores what is not there yet.
        dir: folder of the cache; made when missing.

    Whole distributions (`full`, `student_topk`) are not cached and not offered.
    """

    def __init__(self, *, teacher: TeacherScorer, dir: str) -> None:
        self.teacher = teacher
        self.dir = dir
        self._limit = 0
        self._identity: str | None = None

    @property
    def offers(self) -> ScoreRequest:
        return replace(self.teacher.offers, full=False, student_topk=0)

    @property
    def any_temperature(self) -> bool:
        return self.teacher.any_temperature

    @property
    def vocab_size(self) -> int | None:
        return self.teacher.vocab_size

    def setup(self, student: StudentInfo) -> None:
        self._limit = student.vocab_limit
        try:
            Path(self.dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ScoringError(
                problem("model.teacher.dir: cannot make the folder", got=f"{self.dir} ({error})")
            ) from error
        self.teacher.setup(student)

    def teardown(self) -> None:
        self.teacher.teardown()

    def identity(self) -> str:
        if self._identity is None:
            self._identity = self.teacher.identity()
        return self._identity

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        files = [self._file(rollouts, i, request) for i in range(len(rollouts))]
        known = [_read(file) for file in files]
        missing = [i for i, entry in enumerate(known) if entry is None]
        if missing:
            index = torch.tensor(missing, device=rollouts.tokens.device)
            fresh = rollouts.select(index)
            scores = self.teacher.score(fresh, request)
            for row, i in enumerate(missing):
                end = int(fresh.lengths[row])
                entry = {"valid": scores.valid[row, :end]}
                for name in _FIELDS:
                    value = getattr(scores, name)
                    if value is not None:
                        entry[name] = value[row, :end]
                known[i] = {name: value.contiguous().cpu() for name, value in entry.items()}
                _write(files[i], known[i] or {})
        return _pad([entry for entry in known if entry is not None], rollouts)

    def _file(self, rollouts: RolloutBatch, i: int, request: ScoreRequest) -> Path:
        end = int(rollouts.lengths[i])
        facts = [self.identity(), repr(request), self._limit, rollouts.tokens[i, :end].tolist()]
        facts.append(rollouts.loss_mask[i, :end].int().tolist())
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return Path(self.dir) / key[:2] / f"{key}.safetensors"


def _read(file: Path) -> dict[str, Tensor] | None:
    if not file.exists():
        return None
    try:
        return load_file(file)
    except Exception:  # a damaged entry is as good as none: it is scored and written again
        return None


def _write(file: Path, entry: Mapping[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    os.close(handle)
    save_file(dict(entry), temporary)
    os.replace(temporary, file)


def _pad(entries: list[dict[str, Tensor]], rollouts: RolloutBatch) -> TeacherScores:
    device, shape = rollouts.tokens.device, rollouts.tokens.shape
    grids: dict[str, Tensor] = {}
    for name in entries[0]:
        first = entries[0][name]
        grid = first.new_zeros(*shape, *first.shape[1:])
        for i, entry in enumerate(entries):
            grid[i, : len(entry[name])] = entry[name]
        grids[name] = grid.to(device)
    return TeacherScores(valid=grids.pop("valid"), **grids)  # type: ignore[arg-type]
