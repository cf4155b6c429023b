"""How long each phase of a step took, and at how many tokens per second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PhaseClock"]


class PhaseClock:
    """Seconds and tokens of named phases; a phase entered twice adds up.

    Example:
        >>> clock = PhaseClock()
        >>> with clock.phase("teacher"):
        ...     clock.tokens("teacher", 100)
        >>> sorted(clock.metrics())
        ['time/teacher', 'tokens_per_second/teacher']
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body as `time/<name>` seconds."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def tokens(self, name: str, count: int) -> None:
        """Add `count` tokens to `tokens_per_second/<name>`."""
        self._tokens[name] = self._tokens.get(name, 0) + count

    def metrics(self) -> dict[str, float]:
        """Return `time/<phase>` (seconds) and `tokens_per_second/<phase>`."""
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        rates = {
            f"tokens_per_second/{name}": count / self._seconds[name]
            for name, count in self._tokens.items()
            if self._seconds.get(name, 0.0) > 0
        }
        return {**times, **rates}

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
