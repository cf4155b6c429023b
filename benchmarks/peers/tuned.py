"""Settings of TRL with which it was faster on a case than with its largest batch, found by trying.

On the CPU the largest batch is not the fastest: its tensors leave the caches. With completions of very unequal length,
transformers' continuous batching for the rollouts (GRPOTrainer alone has it) does not wait for the longest; with equal
lengths it is several times slower. A static cache and torch.compile changed nothing.
"""

from __future__ import annotations

from typing import Any

_CONTINUOUS = {"use_transformers_continuous_batching": True}

TUNED: dict[tuple[str, str], dict[str, Any]] = {
    ("fixed", "grpo"): {"batch": 16},
    ("fixed", "distil"): {"batch": 16},
    ("tail", "grpo"): _CONTINUOUS,
    ("tail", "distil"): {"batch": 16},
    ("vocab", "distil"): {"batch": 4},
    ("long", "grpo"): {"batch": 8},
    ("long", "distil"): {"batch": 8},
    ("sparse", "grpo"): _CONTINUOUS,
    ("sparse", "distil"): {"batch": 15},
}
"""By case and method; `batch` is the number of sequences learned from at once, the rest are the config's arguments."""
