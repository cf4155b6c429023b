"""The student's scores of sampled tokens, without ever holding `[N, L, V]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distillkit.backbone import LMHead, chunk_rows, predicting_states
from distillkit.buffers import Scratch
from distillkit.chunks import Columns, Guess, Score, head_output, score_positions
from distillkit.components import DivergenceEstimator
from distillkit.functional.logprobs import entropy, log_softmax, scatter_tokens, token_logprobs
from distillkit.types import RolloutBatch, StudentScores, TeacherScores, TokenScores

__all__ = ["ScorePlan", "StudentScorer"]


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


class _Wanted(NamedTuple):
    """Which columns to compute, one value per position each; `distil` only where it is not `logprobs`."""

    logprobs: bool
    distil: bool
    divergence: bool
    reference: bool
    entropy: bool
    teacher_logprobs: bool


_CARRIES = _Wanted(True, True, True, True, False, False)
"""Whether gradient flows out of each column."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Other:
    """What a frozen model says of m positions; `output` [m, V] is what its head gave for them."""

    valid: Tensor
    sampled: Tensor | None
    topk_ids: Tensor | None
    topk: Tensor | None
    hidden: Tensor | None
    output: Tensor | None
    head: Callable[[Tensor], Tensor] | None

    @staticmethod
    def of(scores: TeacherScores | None, mask: Tensor) -> _Other | None:
        if scores is None:
            return None
        flat = {
            name: None if (value := getattr(scores, name)) is None else value[mask]
            for name in ("valid", "sampled", "topk_ids", "topk")
        }
        hidden = None if scores.hidden is None else torch.cat(list(scores.hidden))
        return _Other(hidden=hidden, output=None, head=scores.head, **flat)  # type: ignore[arg-type]

    def rows(self, rows: slice) -> _Other:
        cut: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("valid", "sampled", "topk_ids", "topk", "hidden", "output")
        }
        return replace(self, **cut)

    def projected(self, limit: int, scratch: Scratch, name: str) -> _Other:
        assert self.hidden is not None and self.head is not None
        return replace(self, output=head_output(self.head, self.hidden, limit, scratch, name))

    @torch.no_grad()
    def logits(self, temperature: float) -> Tensor:
        assert self.output is not None
        finished = self.head.finish(self.output) if isinstance(self.head, LMHead) else self.output
        return _scaled(finished, temperature)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Positions:
    """m target tokens, and what the frozen models say of them."""

    plan: ScorePlan
    targets: Tensor
    teacher: _Other | None
    reference: _Other | None

    def rows(self, rows: slice) -> _Positions:
        teacher, reference = (None if side is None else side.rows(rows) for side in (self.teacher, self.reference))
        return replace(self, targets=self.targets[rows], teacher=teacher, reference=reference)

    def projected(self, limit: int, wanted: _Wanted, scratch: Scratch) -> _Positions:
        """With the head outputs that the wanted columns read."""
        found = self
        for name, estimator, read in (
            ("teacher", self.plan.divergence, wanted.divergence or wanted.teacher_logprobs),
            ("reference", self.plan.reference_divergence, wanted.reference),
        ):
            other: _Other | None = getattr(self, name)
            if read and other is not None and estimator is not None and estimator.needs.needs_distribution:
                changed: dict[str, Any] = {name: other.projected(limit, scratch, name)}
                found = replace(found, **changed)
        return found


class StudentScorer(nn.Module):
    """The student: backbone and head, scored in chunks of token positions.

    Every training forward is a call of this module, so that a strategy that wraps it sees each one.

    Args:
        model: a causal language model (a peft wrapper is fine).
        vocab_limit: ids at or beyond it take part in no softmax.
        head_chunk: token positions per head call; None keeps a chunk's logits near 64 MiB on a CPU, 256 MiB elsewhere.
    """

    def __init__(self, model: nn.Module, *, vocab_limit: int, head_chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.vocab_limit = vocab_limit
        self.head_chunk = head_chunk
        self._last_guess: Guess | None = None

    def forward(
        self,
        batch: RolloutBatch,
        plan: ScorePlan,
        teacher: TeacherScores | None = None,
        reference: TeacherScores | None = None,
    ) -> StudentScores:
        """Score the `loss_mask` tokens of `batch`; everything returned but the entropy carries gradient."""
        mask, limit = batch.loss_mask, self.vocab_limit
        targets, head = batch.tokens[mask], LMHead(self.model)
        tied = head.tied() if torch.is_grad_enabled() else None
        with nullcontext() if tied is None else tied.forward():
            hidden = predicting_states(self.model, batch, packed=plan.packed)
        sides = [_Other.of(scores, mask) for scores in (teacher, reference)]
        positions = _Positions(plan=plan, targets=targets, teacher=sides[0], reference=sides[1])

        def prepare(rows: slice, flags: Sequence[bool], scratch: Scratch) -> Score:
            wanted = _Wanted(*flags)
            chunk = positions.rows(rows).projected(limit, wanted, scratch)
            return lambda raw, block: _score(head.finish(raw), chunk.rows(block), wanted)

        chunks = list(self._chunks(max(len(targets), plan.most_tokens), hidden.device.type))
        guess = self._guess(plan, mask) if len(chunks) > 1 and head.matrix() is not None else None
        columns = score_positions(
            head, hidden, prepare, carries=_CARRIES, limit=limit, chunks=chunks, guess=guess, tied=tied
        )
        grids = [None if column is None else scatter_tokens(column, mask) for column in columns]
        logprobs, distil, divergence, reference_divergence, spread, teacher_logprobs = grids
        assert logprobs is not None
        return StudentScores(
            loss_mask=mask,
            logprobs=logprobs,
            distil_logprobs=logprobs if distil is None else distil,
            divergence=divergence,
            reference_divergence=reference_divergence,
            entropy=spread,
            teacher_logprobs=teacher_logprobs,
        )

    def _guess(self, plan: ScorePlan, mask: Tensor) -> Guess | None:
        """The plan's, until one was wrong: what made it so, say an objective that reads the log-probs, stays."""
        failed = self._last_guess is not None and self._last_guess.wrong
        if plan.guess is None or failed or not torch.is_grad_enabled():
            return None
        expected = plan.guess()
        distil = None if expected.distil_logprobs is expected.logprobs else expected.distil_logprobs
        grids = (expected.logprobs, distil, expected.divergence, expected.reference_divergence, None, None)
        self._last_guess = Guess(gradients=tuple(None if grid is None else grid[mask] for grid in grids))
        return self._last_guess

    def _chunks(self, positions: int, device: str) -> Iterator[slice]:
        size = chunk_rows(self.vocab_limit, self.head_chunk, device)
        # Every rank calls the head, and equally often: a strategy may gather its weights with each call.
        for start in range(0, max(positions, 1), size):
            yield slice(start, start + size)


def _score(logits: Tensor, at: _Positions, wanted: _Wanted) -> Columns:
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
    other: _Other,
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
        # What a teacher left at positions it could not score may be anything, NaN included; it must reach no gradient.
        sampled = torch.where(other.valid, other.sampled, own.detach())
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
    return torch.where(other.valid, value, torch.zeros_like(value)), sampled


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _gather(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs [m, K] at `ids` [m, K]."""
    return log_softmax(logits, temperature).gather(-1, ids)
