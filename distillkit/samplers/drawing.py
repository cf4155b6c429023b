"""One random token per row: uniform numbers from a request's seed, and a distribution function inverted by them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["draw_tokens", "row_uniforms"]


def row_uniforms(seed: int, rollout: int, count: int) -> NDArray[np.float64]:
    """Return the `count` uniform numbers in [0, 1) [count] float64 that decide one rollout's tokens.

    They depend on the request's seed and the rollout's place in its group alone: not on the batch, the group size or
    the device, and a longer row begins with the shorter one. (PCG64 through `numpy.random.SeedSequence`, which takes in
    all 64 bits of a seed; `torch.Generator` on the CPU keeps 32 of them.)

    Example:
        >>> a, longer, b = row_uniforms(7, 0, 3), row_uniforms(7, 0, 5), row_uniforms(7, 1, 3)
        >>> bool((a == longer[:3]).all()), bool((a == b).any())
        (True, False)
    """
    return np.random.default_rng(np.random.SeedSequence(seed % 2**64, spawn_key=(rollout,))).random(count)


def draw_tokens(
    logits: Tensor, uniforms: Tensor | None, *, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature) by inverting its distribution function.

    Args:
        logits: [n, V], any float dtype; taken to float32.
        uniforms: [n] float64 in [0, 1); not read at temperature 0.
        temperature: 0 takes the most likely token and reports its log-prob at temperature 1.
        top_p: keeps the most likely tokens until their probability reaches `top_p`, renormalised. See *The Curious
            Case of Neural Text Degeneration*, Holtzman et al., 2020, https://arxiv.org/abs/1904.09751, section 3.1.

    Returns:
        Token ids [n] int64 and their log-probs [n] float32 in nats. A token of probability 0 is never drawn.

    Example:
        >>> ids, logprobs = draw_tokens(torch.tensor([[0.0, 0.0]]), torch.tensor([0.7]), temperature=1.0)
        >>> ids.item(), round(logprobs.exp().item(), 6)
        (1, 0.5)
    """
    logits = logits.float()
    if temperature == 0:
        best, ids = logits.max(dim=-1)
        return ids, best - logits.logsumexp(dim=-1)
    assert uniforms is not None
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1, dtype=torch.float64) - ranked
        probs = probs.masked_fill(torch.empty_like(probs, dtype=torch.bool).scatter_(1, order, before >= top_p), 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    ids = _invert(probs, uniforms)
    return ids, probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds the uniform number; its own probability is positive.

    Two levels, blocks of ids and then ids: one pass over [n, V] instead of a cumulative sum over it.
    """
    vocabulary, size = probs.shape[1], 256
    if vocabulary <= size:
        cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
        return _first_above(cumulative, uniforms.to(torch.float64).unsqueeze(-1) * cumulative[:, -1:]).squeeze(-1)
    whole = vocabulary // size * size
    mass = probs[:, :whole].reshape(len(probs), -1, size).sum(dim=-1)
    if whole < vocabulary:
        mass = torch.cat([mass, probs[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    cumulative = mass.cumsum(dim=-1, dtype=torch.float64)
    target = uniforms.to(torch.float64).unsqueeze(-1) * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    ids = block * size + torch.arange(size, device=probs.device)
    inside = probs.gather(-1, ids.clamp(max=vocabulary - 1)).masked_fill(ids >= vocabulary, 0.0)
    rest = target - (cumulative - mass).gather(-1, block)
    chosen = ids.gather(-1, _first_above(inside.cumsum(dim=-1, dtype=torch.float64), rest)).squeeze(-1)
    return chosen.clamp(max=vocabulary - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first column [n, 1] where a cumulative sum [n, k] exceeds `target` [n, 1]: it has risen there.

    A target that rounding put below 0 falls into the first column that added to the sum, one at or beyond the sum into
    the last.
    """
    below = torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(()))
    column = torch.searchsorted(cumulative, torch.minimum(target.clamp(min=0), below), right=True)
    return column.clamp(max=cumulative.shape[1] - 1)  # NaN is above everything
