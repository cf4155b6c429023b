"""Several teachers as one: each row has its own, or all are averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.errors import ConfigError, DataError, did_you_mean, problem
from distillkit.teachers._combined import averaged, routed
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["MixtureTeacher"]

_EVERYTHING = 2**31


class MixtureTeacher(TeacherScorer):
    """Several teachers of one vocabulary: the one that a row names, or Σ_i w_i·π_i over all of them.

    **By row** (`route`): the column's value names the teacher, and the scores are that teacher's. It offers what all of
    them offer. A value without a teacher is refused before training starts.

    **Averaged** (no `route`): log π(v) = log Σ_i w_i·π_i(v), each π_i at the distil temperature. A token is scored
    where every teacher can score it. The sampled token needs the teachers' sampled log-probs alone. Top-k tokens, whole
    distributions and entropies are computed from the average itself, chunk by chunk, and offered where every teacher
    gives whole distributions (`local`, `adapter_off`). Of teachers that give top-k alone (`vllm`), no top-k of the
    average is offered: a token that one of them leaves out has an unknown probability there, and to count it as 0
    would lower the average at just the tokens on which the teachers disagree.

    Args:
        teachers: by name; each has the student's token ids.
        route: column of the dataset rows whose value is a teacher's name; None averages.
        weights: w_i by name, above 0, one for each teacher; divided by their sum. None: all equal.
        head_chunk: token positions per head call for top-k and entropy of an average; None keeps a chunk near 64 MiB
            on a CPU, 256 MiB elsewhere.

    Raises:
        ConfigError: no teachers, both `route` and `weights`, or weights that are not one positive number per teacher.
        DataError: while scoring, a row whose value names no teacher.
    """

    def __init__(
        self,
        *,
        teachers: dict[str, TeacherScorer],
        route: str | None = None,
        weights: dict[str, float] | None = None,
        head_chunk: int | None = None,
    ) -> None:
        if not teachers:
            raise ConfigError(problem("model.teacher.teachers", got="{}", expected="at least one teacher by its name"))
        if route is not None and weights is not None:
            where = "model.teacher: both route and weights are given"
            hint = "weights: null for one teacher per row, or route: null to average all"
            raise ConfigError(problem(where, got=f"route {route!r}, weights {weights}", expected="one", hint=hint))
        if weights is not None:
            _check_weights(weights, list(teachers))
        self.teachers = dict(teachers)
        self.route = route
        self.weights = weights
        self.head_chunk = head_chunk
        self._limit = 0

    @property
    def offers(self) -> ScoreRequest:
        parts = [part.offers for part in self.teachers.values()]
        sampled, full = all(p.sampled for p in parts), all(p.full for p in parts)
        if self.route is None:
            most = _EVERYTHING if full else 0
            return ScoreRequest(sampled=sampled, topk=most, student_topk=most, full=full, entropy=full)
        topk, student_topk = min(p.topk for p in parts), min(p.student_topk for p in parts)
        spread = all(p.entropy for p in parts)
        return ScoreRequest(sampled=sampled, topk=topk, student_topk=student_topk, full=full, entropy=spread)

    @property
    def vocab_size(self) -> int | None:
        """The smallest one: an id must have a probability under all."""
        sizes = [size for part in self.teachers.values() if (size := part.vocab_size) is not None]
        return min(sizes, default=None)

    @property
    def any_temperature(self) -> bool:
        return all(part.any_temperature for part in self.teachers.values())

    @property
    def elsewhere(self) -> bool:
        return all(part.elsewhere for part in self.teachers.values())

    @property
    def reads_rows(self) -> bool:
        return self.route is not None or any(part.reads_rows for part in self.teachers.values())

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        if self.route is not None:
            return [(i, reason) for i, row in enumerate(rows) if (reason := self._why_not(row)) is not None]
        return [found for part in self.teachers.values() for found in part.check_rows(rows)]

    def setup(self, student: StudentInfo) -> None:
        self._limit = student.vocab_limit
        for part in self.teachers.values():
            part.setup(student)

    def teardown(self) -> None:
        for part in self.teachers.values():
            part.teardown()

    def identity(self) -> str:
        how = f"by {self.route}" if self.route is not None else f"average {self._weights()}"
        named = [f"{name}={part.identity()}" for name, part in self.teachers.items()]
        return f"mixture:{how}:{':'.join(named)}"

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        if self.route is None:
            return self._average(rollouts, request)
        for i, row in enumerate(rollouts.rows):
            if (reason := self._why_not(row)) is not None:
                where = f"model.teacher.route: no teacher for the prompt {str(rollouts.prompts[i])[:80]!r}"
                raise DataError(problem(where, got=reason, expected=", ".join(self.teachers)))
        names = [str(row[self.route]) for row in rollouts.rows]
        found = []
        for name in dict.fromkeys(names):
            index = torch.tensor([i for i, own in enumerate(names) if own == name], device=rollouts.tokens.device)
            found.append((index, self.teachers[name].score(rollouts.select(index), request)))
        return routed(found, rollouts, vocab_limit=self._limit)

    def _average(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        whole = request.needs_distribution or request.topk > 0 or request.entropy
        wanted = ScoreRequest(sampled=request.sampled, full=whole, temperature=request.temperature)
        scores = [part.score(rollouts, wanted) for part in self.teachers.values()]
        weights = self._weights()
        return averaged(scores, weights, rollouts, request, vocab_limit=self._limit, head_chunk=self.head_chunk)

    def _weights(self) -> list[float]:
        """In the order of the teachers, adding up to 1."""
        given = [1.0 if self.weights is None else self.weights[name] for name in self.teachers]
        return [weight / math.fsum(given) for weight in given]

    def _why_not(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with the row's value, None where it names a teacher."""
        assert self.route is not None
        if self.route not in row:
            near = did_you_mean(self.route, list(row))
            return f"no column {self.route!r}, only {', '.join(row)}" + (f"; did you mean {near!r}?" if near else "")
        value = row[self.route]
        return None if str(value) in self.teachers else f"{self.route}: {value!r}"


def _check_weights(weights: Mapping[str, float], names: Sequence[str]) -> None:
    where = "model.teacher.weights"
    if set(weights) != set(names):
        got, expected = ", ".join(weights) or "{}", f"one for each of {', '.join(names)}"
        raise ConfigError(problem(f"{where}: not those of the teachers", got=got, expected=expected))
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            hint = "leave the teacher out" if weight == 0 else None
            raise ConfigError(problem(f"{where}.{name}", got=weight, expected="a finite number above 0", hint=hint))
