"""The least time that each phase of a case can take: the FLOPs that it needs over the rate of a large matrix product.

    python benchmarks/limit.py [--threads 2]

Counted: 2 FLOPs a weight and token forward, 4 more backward; attention 4 · hidden · layers for each pair of a token
and one that it attends to, and twice that backward; the head only where its result is needed (sampled or scored
tokens). In every phase a prompt goes through once for its whole group, with its own pairs once, and of a completion
all but the last token, which predicts nothing. Rollouts with nothing to learn from are neither scored nor learned
from. Not counted: everything else. Completions of unequal length are counted at their mean, which is less than the
pairs that they have.
"""

from __future__ import annotations

import argparse
import json
import math
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


@dataclass(frozen=True)
class Part:
    """The share of a batch's groups, and of its rollouts, that a phase needs."""

    groups: float
    rollouts: float


def learned(case: Case, method: str) -> Part:
    """Return what the update needs: rollouts of groups whose rewards differ, and those that are distilled on."""
    mixed = (1.0 - case.equal_groups) * (1.0 - 2.0 * _alike(case))
    if method == "grpo":
        return Part(mixed, mixed)
    if method == "kdrl" and case.masked:
        # Only a group with right answers alone has nothing: no advantage, nothing wrong to distil on.
        some = 1.0 - (1.0 - case.equal_groups) * _alike(case)
        return Part(some, some)
    return Part(1.0, 1.0)


def taught(case: Case, method: str) -> Part:
    """Return what the teacher has to score: nothing, all, or wrong answers alone."""
    if method == "grpo":
        return Part(0.0, 0.0)
    if method == "kdrl" and case.masked:
        other = 1.0 - case.equal_groups
        return Part(1.0 - other * _alike(case), case.equal_groups + other / 2)
    return Part(1.0, 1.0)


def _alike(case: Case) -> float:
    """The probability that all rewards of a group are 1: each is 0 or 1 by chance."""
    return 0.5**case.group_size


def whole(case: Case, shape: Shape, completion: float, part: Part) -> float:
    """Return the FLOPs of a forward that gives the logits of every token of the completions, the first's per group."""
    g, n, p = part.groups * case.groups, part.rollouts * case.rollouts, case.prompt_tokens
    tokens = g * p + n * (completion - 1)
    pairs = g * triangle(p) + n * (triangle(p + completion - 1) - triangle(p))
    return forward(shape, tokens, pairs, g + n * (completion - 1), case.vocabulary)


def floor(case: Case, method: str, completion: float) -> Floor:
    """Return the FLOPs of a step whose completions have `completion` tokens on average."""
    return Floor(
        rollout=whole(case, case.student, completion, Part(1.0, 1.0)),
        teacher=whole(case, case.teacher, completion, taught(case, method)),
        update=3 * whole(case, case.student, completion, learned(case, method)),
    )


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


def relative_spread(case: Case) -> float:
    """Return the standard deviation of a completion's length over its mean."""
    if not case.ends:
        return 0.0
    mean, keep = mean_completion(case), 1.0 - 1.0 / case.vocabulary
    # E[length²] = Σ (2k + 1) · P(length > k)
    square = sum((2 * k + 1) * keep**k for k in range(case.new_tokens))
    return math.sqrt(max(0.0, square - mean**2)) / mean


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
