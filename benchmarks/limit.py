"""The least time that each phase of a case can take: the FLOPs that it needs over the rate of a large matrix product.

    python benchmarks/limit.py [--threads 2]

Counted: 2 FLOPs a weight and token forward, 4 more backward; attention 4 · hidden · layers for each pair of a token
and one that it attends to; the head only where its result is needed (sampled or scored tokens); a prompt once for each
group when sampling, once for each rollout when scoring and training. Not counted: everything else.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import torch
from cases import CASES, Case, Shape

METHODS = ("grpo", "distil", "kdrl")
_SIZE = 2048


@dataclass(frozen=True)
class Floor:
    """FLOPs of a step's phases."""

    rollout: float
    teacher: float
    update: float

    def seconds(self, rate: float) -> dict[str, float]:
        """Return the phases and their sum at `rate` FLOP/s."""
        found = {"rollout": self.rollout / rate, "teacher": self.teacher / rate, "update": self.update / rate}
        return {**found, "step": sum(found.values())}


def body_weights(shape: Shape) -> int:
    """Return the weights of the layers: queries and outputs h² each, keys and values h²/2 each, three of h × inner."""
    return shape.layers * (3 * shape.hidden**2 + 3 * shape.hidden * shape.inner)


def forward(shape: Shape, tokens: float, pairs: float, heads: float, vocabulary: int) -> float:
    """Return the FLOPs of a forward.

    Args:
        shape: of the model.
        tokens: that go through the layers.
        pairs: of a token and one that it attends to.
        heads: tokens whose logits are needed.
        vocabulary: rows of the head.
    """
    attention = 4.0 * shape.hidden * shape.layers * pairs
    return 2.0 * body_weights(shape) * tokens + attention + 2.0 * shape.hidden * vocabulary * heads


def triangle(length: float) -> float:
    """Return the pairs of a causal sequence."""
    return length * (length + 1) / 2


def floor(case: Case, method: str, completion: float) -> Floor:
    """Return the FLOPs of a step whose completions have `completion` tokens on average, all rollouts learned from."""
    n, g, p, v = case.rollouts, case.groups, case.prompt_tokens, case.vocabulary
    whole = triangle(p + completion)
    drawn = forward(
        case.student, g * p + n * (completion - 1), g * triangle(p) + n * (whole - triangle(p)), n * completion, v
    )
    scored = (n * (p + completion), n * whole, n * completion, v)
    teacher = 0.0 if method == "grpo" else forward(case.teacher, *scored)
    return Floor(rollout=drawn, teacher=teacher, update=3 * forward(case.student, *scored))


def gemm_rate(repeats: int = 7) -> float:
    """Return the FLOP/s of a product of two float32 matrices of 2048 × 2048, the best of `repeats`."""
    left, right = torch.randn(2, _SIZE, _SIZE)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2.0 * _SIZE**3 / best


def mean_completion(case: Case) -> float:
    """Return the mean length of a completion that ends with probability 1 ÷ vocabulary at every token, or is cut."""
    if not case.ends:
        return float(case.new_tokens)
    keep = 1.0 - 1.0 / case.vocabulary
    return (1.0 - keep**case.new_tokens) * case.vocabulary


def main() -> None:
    """Print the floor of every case and method as lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    rate = gemm_rate()
    for case in CASES.values():
        for method in METHODS:
            least = floor(case, method, mean_completion(case)).seconds(rate)
            print(json.dumps({"case": case.name, "method": method, "gflops_per_second": rate / 1e9, "seconds": least}))


if __name__ == "__main__":
    main()
