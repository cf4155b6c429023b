"""Bytes by kind, with the size of the blocks they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["HEAP_BLOCK", "Blocks", "Phase"]

HEAP_BLOCK = 32 * 2**20
"""From this size on, glibc gives a block its own pages and returns them when it is freed (mallopt(3),
M_MMAP_THRESHOLD); smaller ones share a heap that does not shrink."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes of each kind in one phase of the step."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass
class Blocks:
    """Bytes alive at one moment: `parts` by kind, `heap` of them in blocks below `HEAP_BLOCK`."""

    parts: dict[str, float] = field(default_factory=dict)
    heap: float = 0.0

    def add(self, kind: str, size: float, *, block: float = 0.0) -> None:
        """Count `size` bytes of `kind` that come in blocks of `block` bytes (0: small ones)."""
        if size > 0:
            self.parts[kind] = self.parts.get(kind, 0.0) + size
            self.heap += size if block < HEAP_BLOCK else 0.0

    def add_tensors(self, kind: str, tensors: Sequence[int], width: float, *, pieces: int = 1) -> None:
        """Count tensors of so many elements at `width` bytes each, in `pieces` equal blocks a tensor."""
        for elements in tensors:
            self.add(kind, elements * width, block=elements * width / pieces)

    def __add__(self, other: Blocks) -> Blocks:
        kinds = [*self.parts, *(kind for kind in other.parts if kind not in self.parts)]
        parts = {kind: self.parts.get(kind, 0.0) + other.parts.get(kind, 0.0) for kind in kinds}
        return Blocks(parts=parts, heap=self.heap + other.heap)
