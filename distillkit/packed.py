"""Rollouts as one row without padding, each prompt once for all the completions in the row that continue it.

A transformers model runs such a row when its attention goes through `tree_attention`, which `enable_packing` sees to
and checks on numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distillkit.functional.tree_attention import Branches, tree_attention

__all__ = ["PackedRow", "enable_packing", "packed_states", "packs"]

_NAME = "distillkit"
_TOLERANCE, _LOW_PRECISION = 1e-3, 5e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRow:
    """Sequences of one row.

    | field | shape, dtype | meaning |
    |---|---|---|
    | `source` | [S] int64 | which token of the flattened [n, L] grid stands at each place of the row |
    | `positions` | [S] int64 | position in its own sequence, from 0 |
    | `place` | [n, L] int64 | where each token of the grid stands in the row; 0 on padding |
    | `branches` | | who attends to whom |
    """

    source: Tensor
    positions: Tensor
    place: Tensor
    branches: Branches

    @staticmethod
    def of(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> PackedRow:
        """Lay out right-padded sequences; those whose prompts are the same tokens share one.

        Args:
            tokens: [n, L] int64.
            prompt_lengths: [n] int64.
            lengths: [n] int64, prompt and completion.
        """
        grid, width = tokens.cpu().numpy(), tokens.shape[1]
        prompts, ends = prompt_lengths.tolist(), lengths.tolist()
        groups: dict[bytes, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(grid[i, :prompt].tobytes(), []).append(i)
        place = np.zeros(grid.shape, dtype=np.int64)
        pieces: list[tuple[int, int, int]] = []  # row of the grid, first column, last column + 1
        shared, at = [], 0
        for rows in groups.values():
            first, prompt = at, prompts[rows[0]]
            pieces.append((rows[0], 0, prompt))
            place[rows, :prompt] = np.arange(first, first + prompt)
            at += prompt
            for i in rows:
                pieces.append((i, prompt, ends[i]))
                place[i, prompt : ends[i]] = np.arange(at, at + ends[i] - prompt)
                at += ends[i] - prompt
            if at > first + prompt > first:
                shared.append((first + prompt, at, first, first + prompt))
        starts = np.cumsum([0, *(end - start for _, start, end in pieces)]).tolist()
        columns = np.concatenate([np.arange(start, end) for _, start, end in pieces])
        rows_of = np.repeat([i for i, _, _ in pieces], [end - start for _, start, end in pieces])
        to_device = [torch.from_numpy(array).to(tokens.device) for array in (rows_of * width + columns, columns, place)]
        causal = tuple((start, end) for start, end in pairwise(starts) if end > start)
        return PackedRow(
            source=to_device[0], positions=to_device[1], place=to_device[2],
            branches=Branches(causal=causal, shared=tuple(shared)),
        )  # fmt: skip


def packed_states(backbone: nn.Module, tokens: Tensor, row: PackedRow) -> Tensor:
    """Run the layers over the row and return the hidden states [S, H] of its tokens; they carry gradient."""
    # A mask of four dimensions is taken as it is: none is built. `_attention` does not read it.
    whatever = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    states: Tensor = backbone(
        input_ids=tokens.flatten()[row.source].unsqueeze(0), position_ids=row.positions.unsqueeze(0),
        attention_mask=whatever, use_cache=False, packed_branches=row.branches,
    ).last_hidden_state  # fmt: skip
    return states[0]


def packs(model: PreTrainedModel) -> bool:
    """Return whether the model runs packed rows where it is now: there is a kernel for the CPU alone."""
    return model.config._attn_implementation == _NAME and model.device.type == "cpu"


def enable_packing(model: PreTrainedModel) -> bool:
    """Let the model run packed rows where that gives the same states; return whether it does.

    Not with sliding windows, sinks or soft-capped scores, nor where the code does not hand attention its arguments on;
    such a model is left as it was.
    """
    before = model.config._attn_implementation
    if before != "sdpa" or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(_NAME)
    if model.config._attn_implementation == _NAME and _same_states(model):
        return True
    model.set_attn_implementation(before)
    return False


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_branches: Branches | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a model's layers call: over a packed row where there is one, else as transformers does it."""
    if packed_branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    beyond = {name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if options.get(name) is not None}
    if beyond or options.get("dropout") or value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(f"packed rows with {sorted(beyond) or 'dropout or a value size of its own'}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    out = tree_attention(query, key.to(query.dtype), value.to(query.dtype), packed_branches, options.get("scaling"))
    return out.transpose(1, 2), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@torch.no_grad()
def _same_states(model: PreTrainedModel) -> bool:
    """Compare two groups as a packed row with each rollout alone."""
    tokens = torch.tensor([[0, 1, 2, 3, 1, 0], [0, 1, 2, 2, 2, 0], [3, 2, 1, 0, 3, 2]], device=model.device)
    prompts, ends = torch.tensor([3, 3, 1]), torch.tensor([6, 5, 6])
    backbone = model.base_model
    modes = [module for module in model.modules() if module.training]
    model.eval()
    try:
        row = PackedRow.of(tokens, prompts, ends)
        ours = packed_states(backbone, tokens, row)[row.place].float()
        alone: Tensor = backbone(input_ids=tokens, use_cache=False).last_hidden_state.float()
    except Exception:  # whatever a model's own code makes of arguments that it does not know
        return False
    finally:
        for module in modes:
            module.training = True
    real = torch.arange(tokens.shape[1]) < ends[:, None]
    gap = (ours - alone)[real].norm() / alone[real].norm()
    return bool(gap < (_TOLERANCE if torch.finfo(model.dtype).bits >= 32 else _LOW_PRECISION))
