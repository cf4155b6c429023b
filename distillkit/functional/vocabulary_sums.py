"""Sums over a vocabulary whose logits arrive some columns at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SoftmaxSums"]


class SoftmaxSums:
    """log Σ_v e^{z_v}, and the means Σ_v softmax(z)_v · y_v of other values, of M rows.

    Sums are kept relative to the largest logit so far, so no exponential overflows: with a larger one in the next
    columns, they shrink by e^{old − new}. No gradient.

    See *Online normalizer calculation for softmax*, Maxim Milakov and Natalia Gimelshein, 2018,
    https://arxiv.org/abs/1805.02867 (algorithm 3).

    Args:
        rows: M.
        means: number of values whose mean is wanted.
        like: of the dtype and device of the logits.

    Example:
        >>> sums = SoftmaxSums(1, 1, like=torch.zeros(()))
        >>> for column in torch.tensor([[0.0, 3.0], [0.0, 1.0]]):
        ...     sums.add(slice(0, 1), column[None, :1], [column[None, 1:]], torch.empty(1, 1))
        >>> round(sums.logsumexp.exp().item(), 4), round(sums.mean(0).item(), 4)
        (2.0, 2.0)
    """

    def __init__(self, rows: int, means: int, *, like: Tensor) -> None:
        self._largest = like.new_full((rows,), -torch.inf)
        self._sums = like.new_zeros(1 + means, rows)

    def add(self, rows: slice, logits: Tensor, values: Sequence[Tensor], scratch: Tensor) -> None:
        """Add columns: logits [m, C] of the rows, the values [m, C] of each mean, which are overwritten.

        `scratch` [m, C] is overwritten too; one of the values may be `logits`.
        """
        largest = torch.maximum(self._largest[rows], logits.amax(dim=1))
        powers = torch.sub(logits, largest[:, None], out=scratch).exp_()
        terms = torch.stack([powers.sum(dim=1), *(value.mul_(powers).sum(dim=1) for value in values)])
        self._sums[:, rows] = self._sums[:, rows] * (self._largest[rows] - largest).exp() + terms
        self._largest[rows] = largest

    @property
    def logsumexp(self) -> Tensor:
        """[M]."""
        return self._largest + self._sums[0].log()

    def mean(self, i: int) -> Tensor:
        """Return the mean [M] of the i-th values."""
        return self._sums[1 + i] / self._sums[0]
