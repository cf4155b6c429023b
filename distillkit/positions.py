"""Token positions, what frozen models say of them, and the columns that are computed of both.

`by_rows` has the student's logits of whole rows; `streamed` has the states alone and sums over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distillkit.backbone import LMHead
from distillkit.buffers import Scratch
from distillkit.chunks import Columns, head_output
from distillkit.components import DivergenceEstimator
from distillkit.functional.logprobs import entropy, log_softmax, token_logprobs
from distillkit.streamed import Head, stream, streams
from distillkit.tied import TiedGradient
from distillkit.types import StudentScores, TeacherScores, TokenScores

__all__ = ["CARRIES", "Other", "Positions", "ScorePlan", "Wanted", "by_rows", "streamed"]


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What one forward of the student computes for each token.

    `most_tokens` is the most that any rank sends; `packed` runs the rollouts as one row, see `distillkit.packed`.
    `guess` gives the gradient that the loss is expected to have in each score, see `distillkit.chunks.Guess`.
    """

    sampling_temperature: float
    distil_temperature: float
    divergence: DivergenceEstimator | None = None
    reference_divergence: DivergenceEstimator | None = None
    entropy: bool = False
    most_tokens: int = 0
    packed: bool = False
    guess: Callable[[], StudentScores] | None = None


class Wanted(NamedTuple):
    """Which columns to compute, one value per position each; `distil` only where it is not `logprobs`."""

    logprobs: bool
    distil: bool
    divergence: bool
    reference: bool
    entropy: bool
    teacher_logprobs: bool


CARRIES = Wanted(True, True, True, True, False, False)
"""Whether gradient flows out of each column."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Other:
    """What a frozen model says of m positions; `output` [m, V] is what its head gave for them."""

    valid: Tensor
    sampled: Tensor | None
    topk_ids: Tensor | None
    topk: Tensor | None
    hidden: Tensor | None
    output: Tensor | None
    head: Callable[[Tensor], Tensor] | None

    @staticmethod
    def of(scores: TeacherScores | None, mask: Tensor) -> Other | None:
        if scores is None:
            return None
        flat = {
            name: None if (value := getattr(scores, name)) is None else value[mask]
            for name in ("valid", "sampled", "topk_ids", "topk")
        }
        hidden = None if scores.hidden is None else torch.cat(list(scores.hidden))
        return Other(hidden=hidden, output=None, head=scores.head, **flat)  # type: ignore[arg-type]

    def rows(self, rows: slice) -> Other:
        cut: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("valid", "sampled", "topk_ids", "topk", "hidden", "output")
        }
        return replace(self, **cut)

    def projected(self, limit: int, scratch: Scratch, name: str) -> Other:
        assert self.hidden is not None and self.head is not None
        return replace(self, output=head_output(self.head, self.hidden, limit, scratch, name))

    @torch.no_grad()
    def logits(self, temperature: float) -> Tensor:
        assert self.output is not None
        finished = self.head.finish(self.output) if isinstance(self.head, LMHead) else self.output
        return _scaled(finished, temperature)


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """m target tokens, and what the frozen models say of them."""

    plan: ScorePlan
    targets: Tensor
    teacher: Other | None
    reference: Other | None

    def rows(self, rows: slice) -> Positions:
        teacher, reference = (None if side is None else side.rows(rows) for side in (self.teacher, self.reference))
        return replace(self, targets=self.targets[rows], teacher=teacher, reference=reference)

    def projected(self, limit: int, wanted: Wanted, scratch: Scratch) -> Positions:
        """With the head outputs that the wanted columns read."""
        found = self
        for name, estimator, read in (
            ("teacher", self.plan.divergence, wanted.divergence or wanted.teacher_logprobs),
            ("reference", self.plan.reference_divergence, wanted.reference),
        ):
            other: Other | None = getattr(self, name)
            if read and other is not None and estimator is not None and estimator.needs.needs_distribution:
                changed: dict[str, Any] = {name: other.projected(limit, scratch, name)}
                found = replace(found, **changed)
        return found


def streamed(head: LMHead, hidden: Tensor, at: Positions, limit: int, tied: TiedGradient | None) -> Columns | None:
    """Return the columns [M] of positions with states [M, H]; None where they need whole rows of logits."""
    plan, device = at.plan, hidden.device
    sides = [(plan.divergence, at.teacher), (plan.reference_divergence, at.reference)]
    divergence = plan.divergence.sums_to if plan.divergence is not None and at.teacher is not None else None
    needs = [e.needs for e, other in sides[divergence is not None :] if e is not None and other is not None]
    one_softmax = plan.sampling_temperature == plan.distil_temperature
    if not one_softmax or any(n.topk or n.needs_distribution for n in needs) or not streams(head, device):
        return None
    theirs = None
    if divergence is not None and at.teacher is not None:
        if not (isinstance(at.teacher.head, LMHead) and streams(at.teacher.head, device)):
            return None
        assert at.teacher.hidden is not None
        # What it could not score may be anything, NaN included.
        states = at.teacher.hidden.masked_fill(~at.teacher.valid[:, None], 0.0)
        theirs = Head.of(at.teacher.head, states, plan.distil_temperature)
    mine = Head.of(head, hidden, plan.sampling_temperature)
    found = stream(mine, at.targets, limit=limit, entropy=plan.entropy, other=theirs, divergence=divergence, tied=tied)
    own, valued = found.logprobs, found.divergence
    teacher: tuple[Tensor | None, Tensor | None]
    if valued is not None and at.teacher is not None:
        known = at.teacher.sampled is not None
        teacher = _valid(at.teacher, valued), _sampled(at.teacher, own) if known else found.other_logprobs
    else:
        teacher = _of_sampled(plan.divergence, own, at.teacher)
    return (
        own,
        None,
        teacher[0],
        _of_sampled(plan.reference_divergence, own, at.reference)[0],
        found.entropy,
        teacher[1],
    )


def _of_sampled(
    estimator: DivergenceEstimator | None, own: Tensor, other: Other | None
) -> tuple[Tensor | None, Tensor | None]:
    """Divergence [M] by the log-probs of the targets, and another model's of these; None where they are not known."""
    if other is None or other.sampled is None:
        return None, None
    sampled = _sampled(other, own)
    if estimator is None:
        return None, sampled
    return _valid(other, estimator(TokenScores(sampled=own), TokenScores(sampled=sampled))), sampled


def _sampled(other: Other, own: Tensor) -> Tensor:
    # What a teacher left at positions it could not score may be anything, NaN included; it must reach no gradient.
    assert other.sampled is not None
    return torch.where(other.valid, other.sampled, own.detach())


def _valid(other: Other, value: Tensor) -> Tensor:
    return torch.where(other.valid, value, torch.zeros_like(value))


def by_rows(logits: Tensor, at: Positions, wanted: Wanted) -> Columns:
    """Return the columns [m] of positions with the student's logits [m, V]."""
    plan = at.plan
    sampling, distilling = plan.sampling_temperature, plan.distil_temperature
    same = sampling == distilling
    sides = (
        (plan.divergence, at.teacher, wanted.divergence, wanted.teacher_logprobs),
        (plan.reference_divergence, at.reference, wanted.reference, False),
    )
    compared = any(
        other is not None and (recorded or (value and estimator is not None and estimator.needs.sampled))
        for estimator, other, value, recorded in sides
    )
    own = None
    if compared or (wanted.logprobs if same else wanted.distil):
        own = token_logprobs(logits, at.targets, distilling)
    logprobs = own if same else token_logprobs(logits, at.targets, sampling) if wanted.logprobs else None
    found = [
        (None, None) if other is None else _compared(logits, own, at.targets, other, estimator if value else None, plan)
        for estimator, other, value, _ in sides
    ]
    spread = entropy(logits.detach(), sampling) if plan.entropy and wanted.entropy else None
    return logprobs, None if same else own, found[0][0], found[1][0], spread, found[0][1]


def _compared(
    logits: Tensor,
    own: Tensor | None,
    targets: Tensor,
    other: Other,
    estimator: DivergenceEstimator | None,
    plan: ScorePlan,
) -> tuple[Tensor | None, Tensor | None]:
    """Divergence [m] from another model, and its log-probs [m] of the targets; None where they are not known.

    `own` [m] are the student's distil log-probs.
    """
    temperature = plan.distil_temperature
    other_logits = None if other.output is None else other.logits(temperature)
    sampled = None
    if own is not None and other.sampled is not None:
        sampled = _sampled(other, own)
    elif own is not None and other_logits is not None:
        sampled = token_logprobs(other_logits, targets)
    if estimator is None:
        return None, sampled
    needs = estimator.needs
    student_topk = other_topk = None
    if needs.student_topk:
        assert other_logits is not None
        ids = logits.detach().topk(needs.student_topk, dim=-1).indices
        student_topk, other_topk = _gather(logits, ids, temperature), _gather(other_logits, ids)
    elif needs.topk:
        assert other.topk_ids is not None and other.topk is not None
        student_topk = _gather(logits, other.topk_ids[:, : needs.topk], temperature)
        other_topk = torch.where(other.valid[:, None], other.topk[:, : needs.topk], student_topk.detach())
    # No more than was asked for: what a column of its own computes is not there when its gradient alone is.
    value = estimator(
        TokenScores(
            sampled=own if needs.sampled else None,
            topk=student_topk,
            logits=_scaled(logits, temperature) if needs.full else None,
        ),
        TokenScores(
            sampled=sampled if needs.sampled else None, topk=other_topk, logits=other_logits if needs.full else None
        ),
    )
    return _valid(other, value), sampled


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _gather(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs [m, K] at `ids` [m, K]."""
    return log_softmax(logits, temperature).gather(-1, ids)
