"""The scores of several teachers put together: one teacher per rollout, or a weighted average of probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from distillkit.backbone import chunk_rows
from distillkit.errors import ScoringError, problem
from distillkit.functional.logprobs import entropy, log_softmax, scatter_tokens
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["averaged", "routed"]

_GRIDS = ("sampled", "topk_ids", "topk", "entropy")
_Head = Callable[[Tensor], Tensor]
T = TypeVar("T")


def averaged(
    scores: Sequence[TeacherScores],
    weights: Sequence[float],
    rollouts: RolloutBatch,
    request: ScoreRequest,
    *,
    vocab_limit: int,
    head_chunk: int | None,
) -> TeacherScores:
    """Return the scores of log Σ_i w_i·π_i; valid where all of `scores` are.

    Args:
        scores: one per teacher, with sampled log-probs where `request` has them, and with hidden states and head where
            it asks for anything else.
        weights: w_i, adding up to 1.
        rollouts: what was scored.
        request: what to return.
        vocab_limit: ids at or beyond it take part in no softmax.
        head_chunk: token positions per head call.
    """
    mask, logs = rollouts.loss_mask, [math.log(weight) for weight in weights]
    valid = torch.stack([one.valid for one in scores]).all(dim=0)
    sampled = None
    if request.sampled:
        columns = [_given(one.sampled, "sampled log-probs") + log for one, log in zip(scores, logs, strict=True)]
        sampled = torch.stack(columns).logsumexp(dim=0).masked_fill(~valid, 0.0)
    if not (request.needs_distribution or request.topk or request.entropy):
        return TeacherScores(valid=valid, sampled=sampled)
    states = [_given(one.hidden, "whole distributions") for one in scores]
    kind = _widest([own for one in states for own in one])
    hidden = tuple(torch.cat([own.to(kind) for own in each], dim=1) for each in zip(*states, strict=True))
    widths = [int(own.shape[1]) for own in (one[0] for one in states)]
    heads = [_given(one.head, "an output head") for one in scores]
    head = _average_head(heads, widths, logs, request.temperature, vocab_limit)
    topk = topk_ids = spread = None
    if request.topk or request.entropy:
        topk, topk_ids, spread = _summaries(torch.cat(hidden), head, request, vocab_limit, head_chunk)
    kept = request.needs_distribution
    return TeacherScores(
        valid=valid,
        sampled=sampled,
        topk_ids=None if topk_ids is None else scatter_tokens(topk_ids, mask),
        topk=None if topk is None else scatter_tokens(topk, mask),
        entropy=None if spread is None else scatter_tokens(spread, mask),
        hidden=hidden if kept else None,
        head=head if kept else None,
    )


def routed(parts: Sequence[tuple[Tensor, TeacherScores]], rollouts: RolloutBatch, *, vocab_limit: int) -> TeacherScores:
    """Return one teacher's scores for each rollout.

    Args:
        parts: (rollout indices [n], their scores), every rollout once.
        rollouts: all of them.
        vocab_limit: columns that the heads have in common.
    """
    shape = rollouts.tokens.shape
    grids: dict[str, Tensor] = {}
    for name in ("valid", *_GRIDS):
        values = [getattr(scores, name) for _, scores in parts]
        if any(value is None for value in values):
            continue
        grid = values[0].new_zeros((*shape, *values[0].shape[2:]), dtype=_widest(values))
        for (index, _), value in zip(parts, values, strict=True):
            grid[index, : value.shape[1]] = value.to(grid)
        grids[name] = grid
    hidden, head = _routed_distributions(parts, len(rollouts), vocab_limit)
    return TeacherScores(valid=grids.pop("valid"), hidden=hidden, head=head, **grids)


def _average_head(
    heads: Sequence[_Head], widths: Sequence[int], logs: Sequence[float], temperature: float, vocab_limit: int
) -> _Head:
    """From all teachers' states side by side [M, ΣH] to logits [M, V]: at `temperature`, those of the average."""

    def head(states: Tensor) -> Tensor:
        columns = [
            one(own)[:, :vocab_limit].div(temperature).log_softmax(dim=-1) + log
            for one, own, log in zip(heads, states.split(list(widths), dim=1), logs, strict=True)
        ]
        # Whoever projects the states divides by the temperature again.
        return torch.stack(columns).logsumexp(dim=0) * temperature

    return head


@torch.no_grad()
def _summaries(
    states: Tensor, head: _Head, request: ScoreRequest, vocab_limit: int, head_chunk: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Top-k log-probs and ids [M, K], entropies [M] of the states [M, ΣH]."""
    k, rows = min(request.topk, vocab_limit), chunk_rows(vocab_limit, head_chunk, states.device.type)
    values, ids, spread = [], [], []
    for start in range(0, max(len(states), 1), rows):
        logits = head(states[start : start + rows])
        if k:
            best = log_softmax(logits, request.temperature).topk(k, dim=-1)
            values.append(best.values)
            ids.append(best.indices)
        if request.entropy:
            spread.append(entropy(logits, request.temperature))
    return torch.cat(values) if k else None, torch.cat(ids) if k else None, torch.cat(spread) if spread else None


def _routed_distributions(
    parts: Sequence[tuple[Tensor, TeacherScores]], count: int, vocab_limit: int
) -> tuple[tuple[Tensor, ...] | None, _Head | None]:
    """Hidden states with the number of their teacher in a last column, and a head that reads it."""
    if any(scores.hidden is None or scores.head is None for _, scores in parts):
        return None, None
    states = [_given(scores.hidden, "hidden states") for _, scores in parts]
    heads = [_given(scores.head, "an output head") for _, scores in parts]
    widths = [int(own[0].shape[1]) for own in states]
    # A state keeps its value in a wider float, and so does a small whole number.
    kind = torch.promote_types(_widest([own for one in states for own in one]), torch.float32)
    hidden: list[Tensor] = [torch.empty(0)] * count
    for number, ((index, _), own) in enumerate(zip(parts, states, strict=True)):
        for i, one in zip(index.tolist(), own, strict=True):
            padded = one.new_zeros((len(one), max(widths) + 1), dtype=kind)
            padded[:, : one.shape[1]], padded[:, -1] = one.to(kind), number
            hidden[i] = padded

    def head(rows: Tensor) -> Tensor:
        whose = rows[:, -1].round().long()
        chosen = [whose == number for number in range(len(heads))]
        found = [
            (own, one(rows[own, :width])[:, :vocab_limit])
            for own, one, width in zip(chosen, heads, widths, strict=True)
            if own.any()
        ]
        kinds = _widest([logits for _, logits in found]) if found else torch.float32
        logits = rows.new_zeros((len(rows), vocab_limit), dtype=kinds)
        for own, one in found:
            logits[own] = one.to(kinds)
        return logits

    return tuple(hidden), head


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    kind = tensors[0].dtype
    for tensor in tensors[1:]:
        kind = torch.promote_types(kind, tensor.dtype)
    return kind


def _given(value: T | None, what: str) -> T:
    if value is None:
        raise ScoringError(problem(f"model.teacher: a teacher of the mixture returned no {what}", got="None"))
    return value
