"""Writing files that a killed process cannot leave half-written, and float32 numbers in their shortest form."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["shortest", "write_atomically"]


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader, or a run after a kill, finds the old content or the new, never a mixture.

    The folder is made when it is missing. The data is on the disk when the function returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def shortest(values: Sequence[float]) -> list[float]:
    """Return float32 numbers as the floats with the fewest digits that are the same float32.

    A value that is no float32 (a float64 with more digits) is left as it is.

    Example:
        >>> import torch
        >>> torch.tensor([0.1]).tolist(), shortest(torch.tensor([0.1]).tolist())
        ([0.10000000149011612], [0.1])
    """
    wide = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    same = (narrow == wide).tolist()
    short = narrow.astype(str).tolist()
    return [
        float(text) if exact and math.isfinite(value) else value
        for text, exact, value in zip(short, same, wide.tolist(), strict=True)
    ]
