"""A teacher pushed further along the way that it came from its base model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distillkit.components import StudentInfo, TeacherScorer
from distillkit.errors import ConfigError, ScoringError, problem
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["ExtrapolatedTeacher"]


class ExtrapolatedTeacher(TeacherScorer):
    """λ·log π_T + (1−λ)·log π_base at the sampled token: what the teacher learned since its base, λ times (G-OPD).

    log π_T − log π_base is taken as a reward of strength λ, with the KL to the base as its price. With `divergence: k1`
    and `distill_through: advantage` the cost of a token is exactly

        A_t = (log π_θ − log π_T) + (λ−1)·(log π_base − log π_T)

    λ = 1 is on-policy distillation, bit for bit the teacher's scores (the base is not loaded); λ = 0 is the KL to the
    base (the teacher is not loaded); between them it interpolates, and λ > 1 extrapolates beyond the teacher (ExOPD;
    1.25 was best in the paper, 1.5 unstable). The base is the student before training or, as *reward correction* when
    the teacher is the larger model, the teacher's own model before its RL.

    **Not normalised.** The scores lack −log Z(prefix), Z = Σ_v π_T^λ·π_base^(1−λ), and for λ > 1 may be above 0. A
    constant per prefix does not matter where each token is weighed against its alternatives: for k1 through the
    advantage and for the expected gradient of k2, it multiplies Σ_v π_θ·∇log π_θ = 0. `train/divergence` is shifted by
    it, and it does change k3, TRRD's ratio, and `distill_through: reward`, where an earlier token chooses the prefix.

    See *Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation*, 2026,
    https://arxiv.org/abs/2602.12125, equations 11 to 14.

    Args:
        teacher: π_T.
        base: π_base, with the same token ids.
        strength: λ, at least 0.

    Raises:
        ConfigError: `strength` is negative or not finite.

    Positions count where both models could score and the result is finite. Top-k tokens and whole distributions are not
    offered: the mixture's most likely tokens are not known from either model's.
    """

    def __init__(self, *, teacher: TeacherScorer, base: TeacherScorer, strength: float = 1.25) -> None:
        if not 0 <= strength < math.inf:
            where = "model.teacher.strength: how far to go along the way from base to teacher"
            raise ConfigError(problem(where, got=strength, expected="a finite number, at least 0", hint="1.25"))
        self.teacher = teacher
        self.base = base
        self.strength = strength

    @property
    def offers(self) -> ScoreRequest:
        """The sampled token's, where every model in use gives it."""
        return ScoreRequest(sampled=all(part.offers.sampled for part in self._used()))

    @property
    def vocab_size(self) -> int | None:
        """The smaller one: an id must have a probability under both."""
        sizes = [size for part in self._used() if (size := part.vocab_size) is not None]
        return min(sizes, default=None)

    @property
    def any_temperature(self) -> bool:
        return all(part.any_temperature for part in self._used())

    @property
    def reads_rows(self) -> bool:
        return any(part.reads_rows for part in self._used())

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        return [found for part in self._used() for found in part.check_rows(rows)]

    def setup(self, student: StudentInfo) -> None:
        for part in self._used():
            part.setup(student)

    def teardown(self) -> None:
        for part in self._used():
            part.teardown()

    def identity(self) -> str:
        return f"extrapolated:{self.strength}:{':'.join(part.identity() for part in self._used())}"

    def score(self, rollouts: RolloutBatch, request: ScoreRequest) -> TeacherScores:
        wanted = ScoreRequest(sampled=True, temperature=request.temperature)
        scores = [part.score(rollouts, wanted) for part in self._used()]
        if len(scores) == 1:
            return scores[0]
        teacher, base = scores
        if teacher.sampled is None or base.sampled is None:
            got = type(self.teacher if teacher.sampled is None else self.base).__name__
            raise ScoringError(problem("ExtrapolatedTeacher.score: no sampled log-probs were returned", got=got))
        sampled = self.strength * teacher.sampled + (1 - self.strength) * base.sampled
        valid = teacher.valid & base.valid & sampled.isfinite()
        return replace(teacher, valid=valid, sampled=sampled.masked_fill(~valid, 0.0))

    def _used(self) -> tuple[TeacherScorer, ...]:
        """The models whose factor is not 0, teacher before base."""
        factors = ((self.teacher, self.strength), (self.base, 1 - self.strength))
        return tuple(part for part, factor in factors if factor != 0)
