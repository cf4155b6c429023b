"""What a frozen model in this process says about rollouts: shared by the teachers that have one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillkit.functional.logprobs import entropy, log_softmax, scatter_tokens, token_logprobs
from distillkit.functional.packing import micro_batches
from distillkit.models import LMHead, chunk_rows, predicting_states
from distillkit.types import RolloutBatch, ScoreRequest, TeacherScores

__all__ = ["score_rollouts"]


@torch.no_grad()
def score_rollouts(
    model: nn.Module,
    head: LMHead,
    rollouts: RolloutBatch,
    request: ScoreRequest,
    *,
    vocab_limit: int,
    tokens_per_batch: int,
    head_chunk: int | None,
    unscored_ids: tuple[int, ...] = (),
) -> TeacherScores:
    """Score the `loss_mask` tokens of `rollouts`, in micro-batches and chunks of the head; no `[N, L, V]` is kept.

    Args:
        model: a causal language model.
        head: its output head, kept in the scores where whole distributions are asked for.
        rollouts: what to score.
        request: what to say about each token.
        vocab_limit: ids at or beyond it take part in no softmax.
        tokens_per_batch: token budget of one forward, padding included.
        head_chunk: token positions per head call; None keeps a chunk's logits near 256 MiB.
        unscored_ids: tokens of these ids are not valid.
    """
    shape, device = rollouts.tokens.shape, rollouts.tokens.device
    k = min(request.topk, vocab_limit)
    wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    sampled = torch.zeros(shape, dtype=wide, device=device) if request.sampled else None
    spread = torch.zeros(shape, dtype=wide, device=device) if request.entropy else None
    topk = torch.zeros(*shape, k, dtype=wide, device=device) if k else None
    topk_ids = torch.zeros(*shape, k, dtype=torch.long, device=device) if k else None
    hidden: list[Tensor] = [torch.empty(0)] * len(rollouts)
    rows = chunk_rows(vocab_limit, head_chunk)
    for positions in micro_batches(rollouts.lengths.tolist(), tokens_per_batch):
        index = torch.tensor(positions, device=device)
        part = rollouts.select(index)
        length, mask = part.tokens.shape[1], part.loss_mask
        states = predicting_states(model, part)
        if request.needs_distribution:
            for i, own in zip(positions, states.split(mask.sum(dim=1).tolist()), strict=True):
                hidden[i] = own
        if sampled is None and topk is None and spread is None:
            continue
        targets = part.tokens[mask]
        found = [
            _chunk(head(states[i : i + rows])[:, :vocab_limit], targets[i : i + rows], request, k)
            for i in range(0, len(targets), rows)
        ]
        for grid, column in zip((sampled, topk, topk_ids, spread), zip(*found, strict=True), strict=False):
            if grid is not None:
                grid[index, :length] = scatter_tokens(torch.cat([c for c in column if c is not None]), mask)
    valid = rollouts.loss_mask
    if unscored_ids:
        valid = valid & ~torch.isin(rollouts.tokens, torch.tensor(unscored_ids, device=device))
    return TeacherScores(
        valid=valid,
        sampled=sampled,
        topk_ids=topk_ids,
        topk=topk,
        entropy=spread,
        hidden=tuple(hidden) if request.needs_distribution else None,
        head=head if request.needs_distribution else None,
    )


def _chunk(logits: Tensor, targets: Tensor, request: ScoreRequest, k: int) -> tuple[Tensor | None, ...]:
    """Sampled log-probs [m], top-k log-probs and ids [m, K], entropies [m] of one chunk of logits [m, V]."""
    temperature = request.temperature
    sampled = token_logprobs(logits, targets, temperature) if request.sampled else None
    best = log_softmax(logits, temperature).topk(k, dim=-1) if k else None
    spread = entropy(logits, temperature) if request.entropy else None
    return sampled, None if best is None else best.values, None if best is None else best.indices, spread
