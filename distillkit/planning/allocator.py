"""What glibc's malloc keeps of a step's freed blocks, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from distillkit.planning.blocks import Blocks

__all__ = ["FRAGMENTATION", "kept_by_malloc"]

FRAGMENTATION = 0.10
"""Share of the heap lost between blocks of different sizes: one number for all models. Measured on seven it was mostly
around it, and more where layers are recomputed from blocks just below 32 MiB."""


def kept_by_malloc(moments: Sequence[Blocks]) -> list[float]:
    """Return, for each moment of a step, the resident bytes beyond its live blocks.

    The heap is as large as the moment with the most small blocks made it, from the second step on; blocks of 32 MiB and
    more come and go with their own pages.
    """
    heap = (1 + FRAGMENTATION) * max(moment.heap for moment in moments)
    return [heap - moment.heap for moment in moments]
