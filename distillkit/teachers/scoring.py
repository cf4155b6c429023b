"""What a frozen model in this process says about rollouts: shared by the teachers that have one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillkit.backbone import Batching, LMHead, available, chunk_rows, predicting_states, token_batches
from distillkit.chunks import Columns, Score, score_positions
from distillkit.functional.logprobs import entropy, log_softmax, scatter_tokens, token_logprobs
from distillkit.streamed import Head, stream, streams
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
    batching: Batching,
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
        batching: which rollouts share a forward, and how.
        head_chunk: token positions per head call; None keeps a chunk's logits near 64 MiB on a CPU, 256 MiB elsewhere,
            and on a CPU goes over the vocabulary instead, all positions at once, where sums over it are enough.
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
    rows = chunk_rows(vocab_limit, head_chunk, device.type)
    batching = available(batching, model)
    for positions in token_batches(rollouts, tokens_per_batch, batching):
        index = torch.tensor(positions, device=device)
        part = rollouts.select(index)
        length, mask = part.tokens.shape[1], part.loss_mask
        states = predicting_states(model, part, packed=batching == "packed")
        if request.needs_distribution:
            for i, own in zip(positions, states.split(mask.sum(dim=1).tolist()), strict=True):
                hidden[i] = own
        if sampled is None and topk is None and spread is None:
            continue
        targets = part.tokens[mask]
        if head_chunk is None and len(targets) > rows and not k and streams(head, device):
            own = Head.of(head, states, request.temperature)
            found = stream(own, targets, limit=vocab_limit, entropy=request.entropy)
            columns: Columns = (found.logprobs, None, None, found.entropy)
        else:
            columns = _columns(head, states, targets, request, vocab_limit, rows)
        for grid, column in zip((sampled, topk, topk_ids, spread), columns, strict=True):
            if grid is not None and column is not None:
                grid[index, :length] = scatter_tokens(column, mask)
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


def _columns(
    head: LMHead, states: Tensor, targets: Tensor, request: ScoreRequest, vocab_limit: int, rows: int
) -> Columns:
    """Sampled log-probs [M], top-k log-probs and ids [M, K], entropies [M] of positions with states [M, H]."""
    k, temperature = min(request.topk, vocab_limit), request.temperature

    def score(logits: Tensor, ids: Tensor) -> Columns:
        sampled = token_logprobs(logits, ids, temperature) if request.sampled else None
        best = log_softmax(logits, temperature).topk(k, dim=-1) if k else None
        spread = entropy(logits, temperature) if request.entropy else None
        return sampled, None if best is None else best.values, None if best is None else best.indices, spread

    def prepare(chunk: slice, *_: object) -> Score:
        own = targets[chunk]
        return lambda raw, block: score(head.finish(raw), own[block])

    chunks = [slice(start, start + rows) for start in range(0, max(len(targets), 1), rows)]
    return score_positions(head, states, prepare, carries=[False] * 4, limit=vocab_limit, chunks=chunks)
