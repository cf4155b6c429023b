"""Log-probabilities and entropy from logits, always in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["entropy", "log_softmax", "scatter_tokens", "token_logprobs", "widen"]


def widen(logits: Tensor) -> Tensor:
    """Return the tensor in float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log π = log softmax(logits / temperature) [..., V] in nats, float32 (float64 stays)."""
    wide = widen(logits)
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-prob of each given token: log π(y) = z_y/τ − logsumexp(z/τ).

    Args:
        logits: [..., V].
        token_ids: [...] int64.
        temperature: τ of the softmax.

    Returns:
        [...] float32 nats (float64 stays); carries gradient into `logits`.

    Example:
        >>> token_logprobs(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp().item()
        0.5
    """
    # One fused kernel: half the time of a logsumexp.
    return log_softmax(logits, temperature).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return H(π) = −Σ_v π_v log π_v [...] in nats."""
    logp = log_softmax(logits, temperature)
    return -(logp.exp() * logp).sum(dim=-1)


def scatter_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Put M values, in row-major order of `mask`, back into a tensor of the mask's shape, 0 elsewhere.

    Args:
        values: [M, ...]; carries gradient.
        mask: [N, L] bool with M True entries.

    Example:
        >>> scatter_tokens(torch.tensor([1.0, 2.0]), torch.tensor([[True, False], [False, True]])).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.masked_scatter(mask.reshape(*mask.shape, *[1] * (values.dim() - 1)).expand_as(out), values)
