"""Values of token positions from the output head, without the logits of more than one chunk of them.

Two levels. The head runs on a chunk of positions, large enough for a fast product. What is computed of its output runs
on blocks of a few rows, so that temporaries stay in the processor's cache, and so does its gradient, block by block and
by autograd, in the backward pass. One chunk of logits is all that exists of size [positions, V]; their gradient takes
its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from distillkit.backbone import LMHead, project
from distillkit.buffers import ScoredChunk, Scratch, in_pages_of_its_own, keep_freed_pages
from distillkit.tied import TiedGradient

__all__ = [
    "Columns",
    "Guess",
    "Prepare",
    "Score",
    "block_rows",
    "head_output",
    "not_zero",
    "score_positions",
]

Columns = tuple[Tensor | None, ...]
"""Values per position: [m] or [m, K] for each column, None for one that there is not or that was not wanted."""

Score = Callable[[Tensor, slice], Columns]
"""(the head module's output [b, V] for a block of positions, the block's place in its chunk) -> columns."""

_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24
"""Elements of a block. On a CPU 2 MiB in float32: cache, and below what malloc asks new pages for each time. On a GPU
enough for kernels that do not wait for their launch."""

_LEAST_ROWS = 4
"""A softmax shares its rows among the threads; three rows on two threads take as long as four."""

Prepare = Callable[[slice, Sequence[bool], Scratch], Score]
"""(positions of a chunk, which columns are wanted, buffers) -> the chunk's `Score`; called without gradient."""


def block_rows(vocabulary: int, device: str) -> int:
    """Return the rows of a block on a kind of device."""
    return max(_LEAST_ROWS, _BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS_ELSEWHERE) // vocabulary)


def _row_blocks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """The blocks of so many rows; for no rows an empty one."""
    size = block_rows(vocabulary, device.type)
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


@torch.no_grad()
def head_output(head: Callable[[Tensor], Tensor], hidden: Tensor, limit: int, scratch: Scratch, name: str) -> Tensor:
    """Return the output [M, limit] of a frozen model's head, to be finished by `LMHead.finish` if it is one of these.

    It lives in the buffer `name` where the head is a matrix, until the next call with that name.
    """
    matrix = head.matrix() if isinstance(head, LMHead) else None
    if matrix is not None:
        weight, bias = _as_autocast(matrix)
        states = hidden.to(weight.dtype)
        return project(states, weight, bias, scratch.rows(name, len(states), limit, states))
    raw = head.module_output(hidden) if isinstance(head, LMHead) else head(hidden)
    return raw[:, :limit]


@dataclass(kw_only=True, eq=False)
class Guess:
    """The gradient that the loss is expected to have in each column [M]; None for 0.

    Where it is known before the head runs, the head's own gradients are formed while its output is there. `wrong` is
    set when the loss then had another gradient; nothing but time is lost.
    """

    gradients: Columns
    wrong: bool = False

    def is_right(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether the gradients are these, bit by bit, and take note."""
        for guess, gradient in zip(self.gradients, gradients, strict=True):
            known, given = (tensor is not None and bool(tensor.any()) for tensor in (guess, gradient))
            self.wrong |= known != given
            if guess is not None and gradient is not None and known and given:
                self.wrong |= not torch.equal(guess, gradient)
        return not self.wrong


def score_positions(
    head: LMHead,
    hidden: Tensor,
    prepare: Prepare,
    *,
    carries: Sequence[bool],
    limit: int,
    chunks: Sequence[slice],
    guess: Guess | None = None,
    tied: TiedGradient | None = None,
) -> Columns:
    """Return the columns [M] of the positions with states `hidden` [M, H].

    With more than one chunk, the head's output is computed again in the backward pass, unless it is a matrix and
    `guess` turns out right.

    Args:
        head: of the model.
        hidden: carries gradient, as the head's weights do.
        prepare: what to compute.
        carries: whether gradient flows out of each column.
        limit: columns of the head's output that are read.
        chunks: of positions, at least one; a head that is more than a matrix is called for each, empty or not.
        guess: of the loss's gradient in the columns.
        tied: where the weights are the embedding's too, and `hidden` came out of its `forward`.
    """
    device = hidden.device.type
    if device == "cpu":
        keep_freed_pages()
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    again = len(chunks) > 1 and torch.is_grad_enabled()
    job = _Job(
        prepare=prepare,
        carries=carries,
        limit=limit,
        chunks=chunks,
        autocast=lambda: torch.autocast(device, dtype=dtype, enabled=enabled),
        found={} if again else None,
        guess=guess if again else None,
        tied=tied,
    )
    matrix = head.matrix()
    if matrix is not None:
        weight, bias = _as_autocast(matrix)
        if weight is not matrix[0]:
            job = replace(job, tied=None)  # its gradient is in another dtype
        columns: Columns = _Matrix.apply(job, hidden.to(weight.dtype), weight, bias)  # type: ignore[no-untyped-call]
        return columns

    def called(states: Tensor, rows: slice) -> Columns:
        raw = head.module_output(states)[:, :limit]
        columns: Columns = _Called.apply(job, rows, raw)  # type: ignore[no-untyped-call]
        return columns

    return _joined(
        [
            checkpoint(called, hidden[rows], rows, use_reentrant=False) if again else called(hidden[rows], rows)
            for rows in chunks
        ]
    )


def _as_autocast(matrix: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as `torch.autocast`, where it is on, would hand them to a product."""
    weight, bias = matrix
    device = weight.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return weight, bias
    dtype = torch.get_autocast_dtype(device)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def not_zero(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return None for those that are 0 throughout: the pass back from there would go over every logit for nothing."""
    return [g if g is not None and bool(g.any()) else None for g in grads]


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What the chunks of one call share.

    `found`, where chunks are recomputed, keeps the columns of each: computing the head's output again does not score it
    again.
    """

    prepare: Prepare
    carries: Sequence[bool]
    limit: int
    chunks: Sequence[slice]
    autocast: Callable[[], AbstractContextManager[Any]]
    found: dict[int, Columns] | None = field(default_factory=dict)
    guess: Guess | None = None
    tied: TiedGradient | None = None

    def score(self, raw: Tensor, rows: slice, scratch: Scratch) -> Columns:
        """Return the columns of one chunk, whose head's output is `raw` [m, V]."""
        score, found = self.prepare(rows, [True] * len(self.carries), scratch), ScoredChunk(len(raw))
        for block in _row_blocks(len(raw), self.limit, raw.device):
            found.put(block, score(raw[block], block))
        return found.columns

    def mark(self, ctx: Any, columns: Columns) -> None:
        """Say that no gradient flows out of the columns that carry none."""
        pairs = zip(columns, self.carries, strict=True)
        ctx.mark_non_differentiable(*[column for column, carries in pairs if column is not None and not carries])
        ctx.set_materialize_grads(False)

    def differentiate(
        self, raw: Tensor, rows: slice, grads: Sequence[Tensor | None], scratch: Scratch, out: Tensor
    ) -> Tensor:
        """Write the gradient in `raw` [m, V] to `out` [m, V], which may be `raw`, and return it.

        `grads` are those of the chunk's columns; one that is 0 throughout costs nothing.
        """
        grads = not_zero(grads)
        if all(g is None for g in grads):
            return out.zero_()
        with self.autocast():
            with torch.no_grad():
                score = self.prepare(rows, [g is not None for g in grads], scratch)
            for block in _row_blocks(len(raw), self.limit, raw.device):
                self._differentiate_block(score, raw, block, grads, out)
        return out

    def score_and_differentiate(
        self, raw: Tensor, rows: slice, grads: Sequence[Tensor | None], scratch: Scratch
    ) -> Columns:
        """Return the columns of one chunk, and put the gradient in place of `raw`."""
        grads = not_zero(grads)
        score, found = self.prepare(rows, [True] * len(self.carries), scratch), ScoredChunk(len(raw))
        for block in _row_blocks(len(raw), self.limit, raw.device):
            found.put(block, self._differentiate_block(score, raw, block, grads, raw))
        return found.columns

    @staticmethod
    def _differentiate_block(
        score: Score, raw: Tensor, block: slice, grads: Sequence[Tensor | None], out: Tensor
    ) -> Columns:
        with torch.enable_grad():
            own = raw[block].detach().requires_grad_()
            columns = score(own, block)
        pairs = [
            (column, g[block])
            for column, g in zip(columns, grads, strict=True)
            if column is not None and g is not None and column.requires_grad
        ]
        found = torch.autograd.grad([c for c, _ in pairs], own, [g for _, g in pairs])[0] if pairs else 0.0
        out[block] = found
        return tuple(None if column is None else column.detach() for column in columns)


class _Called(torch.autograd.Function):
    """Columns of one chunk from a head module's output. What made that may need it: the gradient has its own place."""

    @staticmethod
    def forward(ctx: Any, job: _Job, rows: slice, raw: Tensor) -> Columns:
        columns = None if job.found is None else job.found.pop(rows.start, None)
        if columns is None:
            columns = job.score(raw, rows, Scratch())
            if job.found is not None:
                job.found[rows.start] = tuple(None if column is None else column.clone() for column in columns)
        ctx.job, ctx.rows = job, rows
        ctx.save_for_backward(raw)
        job.mark(ctx, columns)
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (raw,) = ctx.saved_tensors
        return None, None, ctx.job.differentiate(raw, ctx.rows, grads, Scratch(), torch.empty_like(raw))


class _Matrix(torch.autograd.Function):
    """Columns of all chunks from a head that is a matrix: every chunk in one buffer, one gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, job: _Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Columns:
        scratch, parts, raw = Scratch(), [], hidden
        sums = None if job.guess is None else _Sums(ctx.needs_input_grad[1:], hidden, weight, bias)
        for rows, states in _filled(job, hidden):
            raw = project(states, weight, bias, scratch.rows("own", len(states), job.limit, states))
            if job.guess is None or sums is None:
                parts.append(job.score(raw, rows, scratch))
                continue
            expected = [None if g is None else g[rows] for g in job.guess.gradients]
            parts.append(job.score_and_differentiate(raw, rows, expected, scratch))
            sums.add(raw, rows, states)
        columns = _joined(parts)
        ctx.job, ctx.sums = job, sums
        ctx.save_for_backward(hidden, weight, bias, None if job.found is not None else raw)
        job.mark(ctx, columns)
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        sums, ctx.sums = ctx.sums, None  # a second backward would find them added to
        if job.guess is not None and sums is not None and job.guess.is_right(grads):
            return None, *sums.gradients(job.tied)
        hidden, weight, bias, kept = ctx.saved_tensors
        del sums
        sums, scratch = _Sums(ctx.needs_input_grad[1:], hidden, weight, bias), Scratch()
        for rows, states in _filled(job, hidden):
            own = [None if g is None else g[rows] for g in grads]
            buffer = scratch.rows("own", len(states), job.limit, states)
            raw = project(states, weight, bias, buffer) if kept is None else kept
            sums.add(job.differentiate(raw, rows, own, scratch, buffer), rows, states)
        return None, *sums.gradients(job.tied)


class _Sums:
    """The gradients of states [M, H], weight [V, H] and bias [V], summed over chunks of positions."""

    def __init__(self, needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.detach()
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        self._to_weight = in_pages_of_its_own(weight) if needed[1] else None
        self._to_bias = torch.zeros_like(bias) if bias is not None and needed[2] else None

    def gradients(self, tied: TiedGradient | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of states, weight and bias; None where it is not needed, or where `tied` returns it later."""
        to_weight = self._to_weight
        return self._hidden, to_weight if tied is None else tied.take(to_weight), self._to_bias

    def add(self, gradient: Tensor, rows: slice, states: Tensor) -> None:
        """Add the chunk `rows`, in order, whose output has the gradient [m, C]; C may be less than V."""
        limit = gradient.shape[1]
        if self._hidden is not None:
            torch.mm(gradient, self._weight[:limit], out=self._hidden[rows])
        if self._to_weight is not None and rows.start == 0:
            torch.mm(gradient.t(), states, out=self._to_weight[:limit])
            self._to_weight[limit:] = 0.0
        elif self._to_weight is not None:
            self._to_weight[:limit].addmm_(gradient.t(), states)
        if self._to_bias is not None:
            self._to_bias[:limit] += gradient.sum(dim=0)


def _filled(job: _Job, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The chunks that hold positions, or the first one, with their states."""
    for rows in job.chunks:
        states = hidden[rows]
        if len(states) or rows.start == 0:
            yield rows, states
