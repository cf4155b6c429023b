"""Attention over a packed row of token sequences that share prefixes.

A row holds groups one after the other: a prompt once, then the completions that continue it. A token of a completion
attends to the whole prompt of its group and to its own completion up to itself, so the row is a forest of trees of
depth two. Nothing is padded, and no mask of the row's length squared exists.

Each token's attention is over at most two blocks of keys. Softmax over their union follows from the blocks' own outputs
o₁, o₂ and log-sum-exps ℓ₁, ℓ₂: ℓ = log(e^ℓ₁ + e^ℓ₂), o = e^(ℓ₁−ℓ) o₁ + e^(ℓ₂−ℓ) o₂. Backward, a block needs only the
union's o and ℓ: its probabilities are e^(scores − ℓ), and rowsum(∂o · o) is the same for every block. See *Ring
Attention with Blockwise Transformers for Near-Infinite Context*, Liu et al., 2023, https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Branches", "tree_attention"]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Which tokens of a packed row attend to which; half-open ranges of positions in the row.

    Attributes:
        causal: (start, end) of every prompt and completion, each attending to itself, causally; in order, and together
            the whole row.
        shared: (start, end, prompt start, prompt end): the tokens of a group's completions and the prompt that each
            attends to as well.
    """

    causal: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int, int, int], ...]


def tree_attention(query: Tensor, key: Tensor, value: Tensor, branches: Branches, scale: float | None = None) -> Tensor:
    """Return softmax(scale · q kᵀ + mask) v, where the mask is that of `branches`.

    Args:
        query: [1, heads, S, D] on the CPU.
        key: [1, key heads, S, D]; each serves heads ÷ key heads queries.
        value: [1, key heads, S, D].
        branches: of the row.
        scale: of the scores; None is 1/√D.

    Returns:
        [1, heads, S, D] in the dtype of the query; carries gradient to all three, once.

    Example:
        >>> value = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1)  # a prompt of one token, two completions of one
        >>> branches = Branches(causal=((0, 1), (1, 2), (2, 3)), shared=((1, 3, 0, 1),))
        >>> tree_attention(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), value, branches).flatten().tolist()
        [1.0, 1.5, 2.5]
    """
    out: Tensor = _TreeAttention.apply(query, key, value, branches, scale)  # type: ignore[no-untyped-call]
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, branches: Branches, scale: float | None) -> Tensor:
        out, spread = _empty(query), torch.empty(query.shape[:3], dtype=_wide(query), device=query.device)
        for run in _runs(branches.causal):
            found = _forward(*(run.of(tensor) for tensor in (query, key, value)), 0.0, True, scale=scale)
            for whole, part in zip((out, spread), found, strict=True):
                run.of(whole).copy_(part)
        for start, end, first, last in branches.shared:
            rows, prompt = slice(start, end), slice(first, last)
            seen, seen_spread = _forward(query[:, :, rows], key[:, :, prompt], value[:, :, prompt], 0.0, scale=scale)
            both = torch.logaddexp(spread[:, :, rows], seen_spread)
            share = torch.exp(seen_spread - both).unsqueeze(-1)
            out[:, :, rows] = torch.lerp(out[:, :, rows].to(share.dtype), seen.to(share.dtype), share).to(out.dtype)
            spread[:, :, rows] = both
        ctx.save_for_backward(query, key, value, out, spread)
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, spread = ctx.saved_tensors
        into = [_empty(tensor) for tensor in (query, key, value)]
        for run in _runs(ctx.branches.causal):
            cut = [run.of(tensor) for tensor in (grad, query, key, value, out, spread)]
            for whole, part in zip(into, _backward(*cut, 0.0, True, scale=ctx.scale), strict=True):
                run.of(whole).copy_(part)
        for start, end, first, last in ctx.branches.shared:
            rows, prompt = slice(start, end), slice(first, last)
            cut = [
                tensor[:, :, places]
                for tensor, places in (
                    (grad, rows), (query, rows), (key, prompt), (value, prompt), (out, rows), (spread, rows),
                )
            ]  # fmt: skip
            parts = _backward(*cut, 0.0, False, scale=ctx.scale)
            for whole, places, part in zip(into, (rows, prompt, prompt), parts, strict=True):
                whole[:, :, places] += part
        return *into, None, None


@dataclass(frozen=True)
class _Run:
    """Neighbouring sequences of one length, which go through a kernel as a batch."""

    start: int
    length: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """[1, heads, S, ...] -> a view [count, heads, length, ...]."""
        own = tensor[0, :, self.start : self.start + self.length * self.count]
        view: Tensor = own.unflatten(1, (self.count, self.length)).transpose(0, 1)
        return view


def _runs(causal: tuple[tuple[int, int], ...]) -> list[_Run]:
    runs = [(length, list(group)) for length, group in groupby(causal, key=lambda sequence: sequence[1] - sequence[0])]
    return [_Run(group[0][0], length, len(group)) for length, group in runs]


def _empty(like: Tensor) -> Tensor:
    """[1, heads, S, D] whose memory is [1, S, heads, D], the layout that a projection makes and takes."""
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
