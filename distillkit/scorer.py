"""The student's scores of sampled tokens, without ever holding `[N, L, V]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from distillkit.backbone import LMHead, chunk_rows, predicting_states
from distillkit.buffers import Scratch
from distillkit.chunks import Guess, Score, score_positions
from distillkit.functional.logprobs import scatter_tokens
from distillkit.positions import CARRIES, Other, Positions, ScorePlan, Wanted, by_rows, streamed
from distillkit.types import RolloutBatch, StudentScores, TeacherScores

__all__ = ["ScorePlan", "StudentScorer"]


class StudentScorer(nn.Module):
    """The student: backbone and head, scored in chunks of token positions.

    Every training forward is a call of this module, so that a strategy that wraps it sees each one.

    Args:
        model: a causal language model (a peft wrapper is fine).
        vocab_limit: ids at or beyond it take part in no softmax.
        head_chunk: token positions per head call; None keeps a chunk's logits near 64 MiB on a CPU, 256 MiB elsewhere,
            and on a CPU goes over the vocabulary instead where that is enough, see `distillkit.streamed`.
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
        sides = [Other.of(scores, mask) for scores in (teacher, reference)]
        positions = Positions(plan=plan, targets=targets, teacher=sides[0], reference=sides[1])

        def prepare(rows: slice, flags: Sequence[bool], scratch: Scratch) -> Score:
            wanted = Wanted(*flags)
            chunk = positions.rows(rows).projected(limit, wanted, scratch)
            return lambda raw, block: by_rows(head.finish(raw), chunk.rows(block), wanted)

        chunks = list(self._chunks(max(len(targets), plan.most_tokens), hidden.device.type))
        columns = None
        if self.head_chunk is None and len(chunks) > 1:
            columns = streamed(head, hidden, positions, limit, tied)
        if columns is None:
            guess = self._guess(plan, mask) if len(chunks) > 1 and head.matrix() is not None else None
            columns = score_positions(
                head, hidden, prepare, carries=CARRIES, limit=limit, chunks=chunks, guess=guess, tied=tied
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
