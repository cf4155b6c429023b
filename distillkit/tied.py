"""One gradient for weights that are both embedding and head.

Autograd would make two of [V, H] and add them: the head's, then one of the embedding that is 0 but for the rows of the
tokens in the batch. With a large vocabulary each is the largest tensor of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["TiedGradient"]


class TiedGradient:
    """Carries the head's gradient of the weights to the embedding, whose backward pass comes last and adds its own.

    Args:
        weight: [V, H], of the head.
        embedding: that begins the forward, of the same weight.
    """

    def __init__(self, weight: Tensor, embedding: nn.Embedding) -> None:
        self._weight, self._embedding = weight, embedding
        self._of_head: Tensor | None = None
        self._embedded = False

    @staticmethod
    def of(weight: Tensor, embedding: nn.Module) -> TiedGradient | None:
        """Return what `predicting_states` may run under, None where head and embedding are not one plain matrix."""
        plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq
        if not plain or not weight.requires_grad or embedding.weight is not weight:
            return None
        assert isinstance(embedding, nn.Embedding)
        return TiedGradient(weight, embedding)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Take the place of the embedding while the layers run."""
        handle = self._embedding.register_forward_hook(self._embed)
        try:
            yield
        finally:
            handle.remove()

    def take(self, of_head: Tensor | None) -> Tensor | None:
        """Return what the head's backward pass is to return for its gradient: nothing where the embedding will."""
        if not self._embedded:
            return of_head
        self._of_head = of_head
        return None

    def _embed(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        self._embedded = True
        found: Tensor = _Embedded.apply(self, args[0], self._weight, out.detach())  # type: ignore[no-untyped-call]
        return found

    def add(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient [V, H] of head and embedding, whose output has the gradient [.., H]."""
        whole, self._of_head = self._of_head, None
        if whole is None:
            whole = torch.zeros_like(self._weight)
        skipped = self._embedding.padding_idx
        if skipped is not None:
            gradient = gradient.masked_fill((ids == skipped).unsqueeze(-1), 0.0)
        return whole.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(whole.dtype))


class _Embedded(torch.autograd.Function):
    """The embedding's output as it is; its gradient joins the head's."""

    @staticmethod
    def forward(ctx: Any, tied: TiedGradient, ids: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        ctx.tied = tied
        ctx.save_for_backward(ids)
        return out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, None, ctx.tied.add(ids, gradient), None
