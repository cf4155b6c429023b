"""Which rollouts go through the student together: updates of a pass, and micro-batches of an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distillkit.backbone import Batching, token_batches
from distillkit.backends import StepBackend
from distillkit.types import RolloutBatch

__all__ = ["MicroBatch", "minibatches", "split"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Rollouts `index` [n] of the batch; `real` is False for the dummy that keeps a rank in step with the others.

    `most_tokens` is the largest number of trainable tokens that a rank has in its micro-batch of the same turn;
    `packed` says that the rollouts go as one row, see `distillkit.packed`.
    """

    index: Tensor
    real: bool
    most_tokens: int
    packed: bool


def minibatches(rollouts: RolloutBatch, number: int, seed: int, backend: StepBackend) -> Iterator[Tensor]:
    """Yield, per update of one pass over the batch, which rollouts take part in it, bool [n].

    Args:
        rollouts: this rank's batch.
        number: of updates.
        seed: of the draw, the same on every rank.
        backend: for the number of rollouts of other ranks.
    """
    n, device = len(rollouts), rollouts.tokens.device
    if number == 1:
        yield torch.ones(n, dtype=torch.bool, device=device)
        return
    generator = torch.Generator().manual_seed(seed)
    # Each run of `number` rows, counted over all ranks, is dealt out to the minibatches: which update a rollout is
    # in does not depend on the number of ranks, and every rank has the same share of each.
    counts = torch.zeros(backend.world_size, dtype=torch.int64, device=device)
    counts[backend.rank] = n
    counts = backend.all_reduce(counts, "sum")
    first = int(counts[: backend.rank].sum())
    runs = -(-int(counts.sum()) // number)
    dealt = torch.rand(runs, number, generator=generator).argsort(dim=1).flatten()
    own = dealt[first : first + n].to(device)
    for i in range(number):
        yield own == i


def split(
    rollouts: RolloutBatch, index: Tensor, budget: int, batching: Batching, backend: StepBackend
) -> Iterator[MicroBatch]:
    """Yield micro-batches of whole rollouts, as many as the rank with the most has, and at least one.

    Args:
        rollouts: this rank's batch.
        index: [n] the rollouts to split.
        budget: tokens per micro-batch, padding included.
        batching: which rollouts go together.
        backend: for agreement between ranks.
    """
    batching = backend.available(batching)
    plan = token_batches(rollouts.select(index), budget, batching) if len(index) else []
    agreed = max(int(backend.all_reduce(torch.tensor([len(plan)], device=index.device), "max")[0]), 1)
    parts = [index[torch.tensor(positions, device=index.device)] for positions in plan]
    parts += [rollouts.lengths.argmin().reshape(1)] * (agreed - len(plan))
    tokens = torch.stack([rollouts.loss_mask[part].sum() for part in parts])
    most = backend.all_reduce(tokens, "max").tolist()
    for i, (part, most_tokens) in enumerate(zip(parts, most, strict=True)):
        yield MicroBatch(index=part, real=i < len(plan), most_tokens=most_tokens, packed=batching == "packed")
