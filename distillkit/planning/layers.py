"""What one decoder layer keeps per token: for the backward pass, in a forward without gradient, in the cache.

H hidden, A query and K key/value columns, I of the MLP; as transformers' Llama, Qwen2, Qwen3 and their like compute.
"""

from __future__ import annotations

from distillkit.planning.model_shape import ModelShape
from distillkit.planning.workload import Workload

__all__ = ["cache_bytes", "cache_columns", "forward_per_token", "saved_columns"]


def saved_columns(shape: ModelShape, bytes_per_weight: int, *, autocast: bool) -> list[tuple[int, int, int]]:
    """Return (columns, bytes per element, arrays) of everything that autograd keeps per token of one layer.

    | | norms | q, output | k, v | MLP |
    |---|---|---|---|---|
    | float32 | 6 H of 4 bytes | 2 A of 4 | 2 K of 4 | 4 I of 4 |
    | bfloat16 weights | 2 H of 4, 4 H of 2 | 2 A of 2 | 2 K of 2 | 4 I of 2 |
    | float32 under autocast | 4 H of 4, and 5 H of 2: inputs cast for five matrices | 2 A of 2 | 2 K of 2 | 4 I of 2 |

    Norms of q and k per head (Qwen3) add two arrays of A and two of K: of 4 bytes in float32, else of 4 and 2.
    """
    whole = bytes_per_weight == 4 and not autocast
    narrow = 4 if whole else 2
    norms = [(4, 6)] if whole else [(4, 4), (2, 5)] if autocast else [(4, 2), (2, 4)]
    found = [(shape.hidden, width, arrays) for width, arrays in norms]
    for columns in (shape.query, shape.key_value):
        found.append((columns, narrow, 2))
        if shape.head_norm:
            found += [(columns, 4, 1), (columns, narrow, 1)]
    return [*found, (shape.intermediate, narrow, 4)]


def forward_per_token(shape: ModelShape, width: int) -> float:
    """Return the bytes per token of a forward without gradient: the MLP's three arrays, or q, k, v and output."""
    attention = 4 * shape.query + 4 * shape.key_value
    return float(width * (3 * shape.hidden + max(3 * shape.intermediate, attention)))


def cache_columns(prompt: int, new: int) -> int:
    """Return the columns of the hf sampler's buffers at the end: they grow by a quarter and 32 whenever they are full.

    Example:
        >>> cache_columns(16, 8), cache_columns(100, 100)
        (52, 228)
    """
    columns = prompt + 32 + prompt // 4
    while columns < prompt + new:
        columns += 32 + columns // 4
    return columns


def cache_bytes(load: Workload, columns: int) -> float:
    """Return the bytes of keys and values of one row; under autocast rotary keys are float32, values bfloat16."""
    each = load.rotary_keys + load.sampling_bytes
    return float(
        sum(each * load.student.key_value * min(columns, window or columns) for window in load.student.windows)
    )
