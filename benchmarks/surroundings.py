"""What a measured process says of where it ran."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from limit import gemm_rate


def surroundings(**versions: str) -> dict[str, Any]:
    """Return versions, processor, cores, memory (bytes), threads, and the rate of a matrix product now (FLOP/s)."""
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, **versions},
        "machine": {
            "processor": _entry("/proc/cpuinfo", "model name"),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": 1024 * int(_entry("/proc/meminfo", "MemTotal").split()[0]),
        },
        "threads": torch.get_num_threads(),
        "flops_per_second": gemm_rate(),
    }


def _entry(path: str, name: str) -> str:
    found = (line.partition(":") for line in Path(path).read_text().splitlines())
    return next(value.strip() for key, _, value in found if key.strip() == name)
