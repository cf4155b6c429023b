"""Memory for the head's large tensors, used again instead of fetched anew."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["ScoredChunk", "Scratch", "in_pages_of_its_own", "keep_freed_pages"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_AT_MOST, _MAPPED_FROM = 2**30, 2**25


@cache
def keep_freed_pages() -> None:
    """Let glibc keep what is freed at the end of its heap, once per process.

    By default it gives back what is beyond twice the largest block that it ever mapped apart and freed, and asks the
    kernel for zeroed pages at the next tensor of some MiB: that takes several times longer than computing with them,
    and every micro-batch would pay it. Blocks of 32 MiB and more, a head's gradient for one, go on having pages of
    their own that leave with them. With another C library nothing happens. See mallopt(3).
    """
    options = _of_glibc("mallopt")
    if options is not None:
        options(_M_MMAP_THRESHOLD, _MAPPED_FROM)
        options(_M_TRIM_THRESHOLD, _KEPT_AT_MOST)


def in_pages_of_its_own(like: Tensor) -> Tensor:
    """Return an uninitialised tensor like a head's weights, for their gradient: the largest of a step.

    On a CPU, from 32 MiB on, what the heap holds free goes back to the kernel first, see malloc_trim(3): at this moment
    memory is at its highest. To have it again later costs less than the pages of this tensor, as a rule.
    """
    give_back = _of_glibc("malloc_trim")
    if like.device.type == "cpu" and like.nbytes >= _MAPPED_FROM and give_back is not None:
        give_back(0)
    return torch.empty_like(like)


@cache
def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


class Scratch:
    """Buffers by name, used again by each chunk: the fresh pages of a new one take as long as the product in it."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def rows(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return an uninitialised tensor [rows, columns] of a dtype; what `name`, of one dtype, held before is lost."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._flat[name] = like.new_empty(rows * columns)
        return flat[: rows * columns].view(rows, columns)


class ScoredChunk:
    """The columns of a chunk of `rows` positions, filled block by block.

    A block's own small tensors, kept until the end, would lie between the pages of its large ones, and the next block's
    would not fit there: malloc's heap would grow by some MiB with each.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.columns: tuple[Tensor | None, ...] = ()

    def put(self, block: slice, columns: tuple[Tensor | None, ...]) -> None:
        """Copy the columns of a block."""
        if not self.columns:
            self.columns = tuple(None if c is None else c.new_empty(self._rows, *c.shape[1:]) for c in columns)
        for whole, part in zip(self.columns, columns, strict=True):
            if whole is not None and part is not None:
                whole[block] = part
