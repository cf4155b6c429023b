"""Values of token positions from output heads, some columns of the vocabulary at a time: no row of logits exists.

A tile is as small as a processor's cache, so products and sums run at its pace, and each part of the head's gradient is
written once. What it costs is a second product with the heads in the backward pass. A divergence fits in where its
value and gradient follow from sums over the vocabulary, see `DivergenceEstimator.sums_to`.

The technique: *Cut Your Losses in Large-Vocabulary Language Models*, Erik Wijmans et al., 2024,
https://arxiv.org/abs/2411.09009, here with a second head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillkit.backbone import LMHead
from distillkit.buffers import Scratch, in_pages_of_its_own, keep_freed_pages
from distillkit.chunks import not_zero
from distillkit.components import ExactKL
from distillkit.functional.logprobs import widen
from distillkit.functional.vocabulary_sums import SoftmaxSums
from distillkit.tied import TiedGradient

__all__ = ["Head", "Streamed", "stream", "streams"]

_TILE, _ROWS = 1024, 1024
"""Columns and rows of a tile: 4 MiB in float32."""

_DEVICES = ("cpu",)
"""Where it was measured to be faster than chunks of whole rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """M states [M, H], and the weights [V, H] that make logits of them, to be divided by the temperature."""

    states: Tensor
    weight: Tensor
    temperature: float = 1.0

    @staticmethod
    def of(head: LMHead, states: Tensor, temperature: float) -> Head:
        """Return one that `streams`."""
        matrix = head.matrix()
        assert matrix is not None
        return Head(states=states.to(matrix[0].dtype), weight=matrix[0], temperature=temperature)

    def logits(self, rows: slice, columns: slice, scratch: Scratch, name: str) -> Tensor:
        """Return a tile [m, C] of logits, float32 or wider; they live in the buffer `name` until its next use."""
        states, weight = self.states[rows], self.weight[columns]
        found = scratch.rows(name, len(states), len(weight), states)
        torch.mm(states, weight.t(), out=found)
        wide = widen(states[:0])
        if wide.dtype != found.dtype:
            found = scratch.rows(f"{name}, wide", len(states), len(weight), wide).copy_(found)
        return found if self.temperature == 1.0 else found.div_(self.temperature)


@dataclass(frozen=True, kw_only=True, eq=False)
class Streamed:
    """Of M positions: log-probs of the targets, carrying gradient; the divergence, likewise; entropies; the other's."""

    logprobs: Tensor
    divergence: Tensor | None
    entropy: Tensor | None
    other_logprobs: Tensor | None


def streams(head: object, device: torch.device) -> bool:
    """Return whether a head's logits can be had, and are worth having, some columns at a time."""
    if not isinstance(head, LMHead) or device.type not in _DEVICES or not head.only_widens:
        return False
    matrix = head.matrix()
    return matrix is not None and matrix[1] is None and not torch.is_autocast_enabled(device.type)


def stream(
    own: Head,
    targets: Tensor,
    *,
    limit: int,
    entropy: bool = False,
    other: Head | None = None,
    divergence: ExactKL | None = None,
    tied: TiedGradient | None = None,
) -> Streamed:
    """Score M positions.

    Args:
        own: states and weights carry gradient.
        targets: token ids [M], below `limit`.
        limit: columns that take part in the softmax.
        entropy: whether to return −Σ_v π_v log π_v.
        other: a frozen model.
        divergence: from it, if it is there.
        tied: where the weights are the embedding's too, and the states came out of its `forward`.

    Raises:
        IndexError: a target is not below `limit`.

    Example:
        >>> own = Head(states=torch.ones(1, 1), weight=torch.tensor([[0.0], [3.0]]).log1p())
        >>> stream(own, torch.tensor([1]), limit=2).logprobs.exp().item()
        0.8
    """
    keep_freed_pages()
    if len(targets) and int(targets.max()) >= limit:
        raise IndexError(f"token id {int(targets.max())} has no place in a softmax over {limit} ids")
    job = _Job(
        targets=targets, limit=limit, entropy=entropy, other=other, divergence=divergence, tied=tied,
        temperature=own.temperature,
    )  # fmt: skip
    logprobs, value, spread, other_logprobs = _Stream.apply(job, own.states, own.weight)  # type: ignore[no-untyped-call]
    return Streamed(logprobs=logprobs, divergence=value, entropy=spread, other_logprobs=other_logprobs)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What forward and backward share, but for the tensors that autograd looks after."""

    targets: Tensor
    limit: int
    entropy: bool
    other: Head | None
    divergence: ExactKL | None
    tied: TiedGradient | None
    temperature: float

    def head(self, states: Tensor, weight: Tensor) -> Head:
        """Return the head that is scored."""
        return Head(states=states, weight=weight, temperature=self.temperature)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every tile, all rows of some columns first; of no rows, empty ones."""
        count = len(self.targets)
        for first in range(0, self.limit, _TILE):
            for row in range(0, max(count, 1), _ROWS):
                yield slice(row, min(row + _ROWS, count)), slice(first, min(first + _TILE, self.limit))

    def met(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns, within a tile, of the targets that are in it."""
        places = self.targets[rows] - columns.start
        inside = ((places >= 0) & (places < columns.stop - columns.start)).nonzero().squeeze(1)
        return inside, places[inside]

    def score(self, own: Head) -> tuple[Streamed, _Known]:
        """Go over the vocabulary once."""
        count, like, scratch = len(self.targets), widen(own.states[:0]), Scratch()
        reverse, forward = self.divergence == "reverse_kl", self.divergence == "forward_kl"
        mine, theirs = SoftmaxSums(count, reverse + self.entropy, like=like), SoftmaxSums(count, forward, like=like)
        picked = like.new_zeros(2, count)
        for rows, columns in self.tiles():
            logits = own.logits(rows, columns, scratch, "own")
            spare, met, gaps = _alike(scratch, "spare", logits), self.met(rows, columns), []
            picked[0, rows][met[0]] = logits[met]
            if self.other is not None:
                others = self.other.logits(rows, columns, scratch, "other")
                picked[1, rows][met[0]] = others[met].to(like.dtype)
                gaps = [torch.sub(logits, others, out=_alike(scratch, "gap", logits))]
                theirs.add(rows, others, gaps if forward else [], spare)
            mine.add(rows, logits, [*(gaps if reverse else []), *([logits] if self.entropy else [])], spare)
        total, other_total = mine.logsumexp, theirs.logsumexp
        value = None
        if reverse:
            value = mine.mean(0) - total + other_total
        elif forward:
            value = total - other_total - theirs.mean(0)
        found = Streamed(
            logprobs=picked[0] - total,
            divergence=value,
            entropy=total - mine.mean(int(reverse)) if self.entropy else None,
            other_logprobs=None if self.other is None else picked[1] - other_total,
        )
        return found, _Known(total, other_total, value)

    def differentiate(
        self, own: Head, known: _Known, grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of states and weights, those that are needed, from those of log-probs and divergence."""
        to_states = torch.zeros_like(own.states, dtype=known.logsumexp.dtype) if needed[0] else None
        to_weight = in_pages_of_its_own(own.weight) if needed[1] else None
        scratch = Scratch()
        for rows, columns in self.tiles():
            slope = self._slope(own, known, grads, rows, columns, scratch)
            if own.temperature != 1.0:
                slope.div_(own.temperature)
            slope = slope.to(own.weight.dtype)
            states, weight = own.states[rows], own.weight[columns]
            if to_states is not None and to_states.dtype == weight.dtype:
                to_states[rows].addmm_(slope, weight)
            elif to_states is not None:
                to_states[rows] += torch.mm(slope, weight)
            if to_weight is not None and rows.start == 0:
                torch.mm(slope.t(), states, out=to_weight[columns])
            elif to_weight is not None:
                to_weight[columns].addmm_(slope.t(), states)
        if to_weight is not None:
            to_weight[self.limit :] = 0.0
        return None if to_states is None else to_states.to(own.states.dtype), to_weight

    def _slope(
        self, own: Head, known: _Known, grads: Sequence[Tensor | None], rows: slice, columns: slice, scratch: Scratch
    ) -> Tensor:
        """Return the gradient [m, C] in a tile of logits.

        Of log π_y: δ_y − π. Of KL(π_θ‖π_T): π_θ (log π_θ − log π_T − KL). Of KL(π_T‖π_θ): π_θ − π_T.
        """
        of_logprob, of_divergence = (None if g is None else g[rows, None] for g in grads)
        probs = own.logits(rows, columns, scratch, "own")
        factor = torch.zeros_like(known.logsumexp[rows, None]) if of_logprob is None else -of_logprob
        theirs = None
        if of_divergence is not None and self.other is not None and known.divergence is not None:
            others = self.other.logits(rows, columns, scratch, "other")
            if self.divergence == "reverse_kl":
                offset = known.logsumexp - known.other_logsumexp + known.divergence
                gap = torch.sub(probs, others, out=_alike(scratch, "gap", probs))
                factor = torch.addcmul(factor, gap.sub_(offset[rows, None]), of_divergence, out=gap)
            else:
                theirs = others.sub_(known.other_logsumexp[rows, None]).exp_().mul_(of_divergence)
                factor = factor + of_divergence
        probs.sub_(known.logsumexp[rows, None]).exp_().mul_(factor)
        if theirs is not None:
            probs.sub_(theirs)
        if of_logprob is not None:
            met = self.met(rows, columns)
            probs[met] += of_logprob[met[0], 0]
        return probs


def _alike(scratch: Scratch, name: str, tile: Tensor) -> Tensor:
    return scratch.rows(name, len(tile), tile.shape[1], tile)


class _Known(NamedTuple):
    """What the backward pass needs of the forward one: log Σ_v e^{z_v} of both heads and the divergence, [M]."""

    logsumexp: Tensor
    other_logsumexp: Tensor
    divergence: Tensor | None


class _Stream(torch.autograd.Function):
    """The columns of `Streamed`, and their gradients from a second pass over the vocabulary."""

    @staticmethod
    def forward(ctx: Any, job: _Job, states: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        found, known = job.score(job.head(states, weight))
        ctx.job = job
        ctx.save_for_backward(states, weight, *known)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[c for c in (found.entropy, found.other_logprobs) if c is not None])
        return found.logprobs, found.divergence, found.entropy, found.other_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        states, weight, *known = ctx.saved_tensors
        own, needed = job.head(states, weight), ctx.needs_input_grad[1:]
        to_states, to_weight = job.differentiate(own, _Known(*known), not_zero(grads[:2]), needed)
        return None, to_states, to_weight if job.tied is None else job.tied.take(to_weight)
