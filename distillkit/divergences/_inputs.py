"""Take what an estimator asked for out of both sides' scores."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distillkit.components import DivergenceEstimator
from distillkit.errors import ContractError, problem
from distillkit.types import TokenScores

__all__ = ["pair"]


def pair(
    part: DivergenceEstimator, student: TokenScores, teacher: TokenScores, field: Literal["sampled", "topk", "logits"]
) -> tuple[Tensor, Tensor]:
    """Return both sides' `field`, the teacher's detached.

    Raises:
        ContractError: a side lacks the field, or the shapes differ.
    """
    ours, theirs = getattr(student, field), getattr(teacher, field)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        shapes = [None if x is None else tuple(x.shape) for x in (ours, theirs)]
        got = f"student {shapes[0]}, teacher {shapes[1]}"
        where = f"{type(part).__name__}: TokenScores.{field}"
        raise ContractError(problem(where, got=got, expected="one shape on both sides"))
    return ours, theirs.detach()
