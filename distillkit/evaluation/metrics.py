"""Metrics of an evaluation set: torchmetrics metrics, one number per problem, combined over ranks.

A problem counts once, however often it was answered: problems that only fill up a rank's share are not taken, and of
several results with one index the first is. Completions that could not be scored (`correct` is None) are left out and
counted as `unscored`. A metric that nothing could be said about is NaN.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from distillkit.evaluation.results import ProblemResult

__all__ = [
    "CompletionLength",
    "EvalMetrics",
    "FormatRate",
    "MajAtK",
    "MeanAtK",
    "PassAtK",
    "ProblemMean",
    "TruncationRate",
    "Unscored",
    "pass_at_k",
]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n completions, drawn without replacement, contain one of the c correct ones.

    1 - C(n - c, k) / C(n, k): the unbiased estimate of pass@k. See *Evaluating Large Language Models Trained on Code*,
    Chen et al., 2021, https://arxiv.org/abs/2107.03374, eq. 1.

    Example:
        >>> pass_at_k(n=4, c=1, k=2)
        0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


class ProblemMean(Metric):
    """Σ value / Σ weight over the distinct problems of an evaluation set; NaN when all weights are 0."""

    full_state_update = False
    index: list[Tensor]
    value: list[Tensor]
    weight: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for state in ("index", "value", "weight"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @abstractmethod
    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (value, weight) of one problem; (0, 0) leaves it out."""

    def update(self, results: Sequence[ProblemResult]) -> None:
        """Add the results of some problems."""
        mine = [result for result in results if result.valid]
        for result in mine:
            value, weight = self.measure(result)
            for state, number in ((self.index, result.index), (self.value, value), (self.weight, weight)):
                # One dtype for all states (indices are exact to 2^24): a rank without results adds an empty one of it.
                state.append(torch.tensor([number], dtype=self.dtype, device=self.device))

    def compute(self) -> Tensor:
        """Return the mean over all ranks, float32."""
        rows = self._distinct()
        weight = rows[:, 1].sum()
        return (rows[:, 0].sum() / weight).float()

    def _distinct(self) -> Tensor:
        """Value and weight [problems, 2] float64 on the CPU, by ascending index."""
        if not len(self.index):
            return torch.zeros(0, 2, dtype=torch.float64)
        columns = [dim_zero_cat(state).double().cpu() for state in (self.index, self.value, self.weight)]
        first: dict[int, int] = {}
        for position, index in enumerate(columns[0].tolist()):
            first.setdefault(int(index), position)
        chosen = torch.tensor([first[index] for index in sorted(first)])
        return torch.stack(columns[1:], dim=1)[chosen]


class PassAtK(ProblemMean):
    """Mean over problems of the unbiased pass@k, n being the scored completions; a problem with n < k is left out.

    Args:
        k: completions that a user would draw.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (pass@k, 1)."""
        scored = _scored(result)
        return (pass_at_k(len(scored), sum(scored), self.k), 1.0) if len(scored) >= self.k else (0.0, 0.0)


class MeanAtK(ProblemMean):
    """Mean over problems of the share of scored completions that are correct."""

    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (share, 1)."""
        scored = _scored(result)
        return (sum(scored) / len(scored), 1.0) if scored else (0.0, 0.0)


class MajAtK(ProblemMean):
    """Mean over problems of whether the most frequent answer is correct.

    Scored completions with an answer vote, by the answer's normal form. A tie counts the share of the tied answers that
    are correct: the expectation of breaking it at random, whatever the order of the completions. A problem on which
    nobody votes counts 0 if an answer was looked for and not found, and is left out if no reward extracts answers.
    """

    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (share of the winning answers that are correct, 1)."""
        voting = [c for c in result.completions if c.answer is not None and c.correct is not None]
        if not voting:
            return 0.0, float(any("unparseable" in c.status.values() for c in result.completions))
        count = Counter(c.answer for c in voting)
        most = max(count.values())
        verdicts = [
            [bool(c.correct) for c in voting if c.answer == answer] for answer in count if count[answer] == most
        ]
        return sum(sum(verdict) / len(verdict) for verdict in verdicts) / len(verdicts), 1.0


class FormatRate(ProblemMean):
    """Share of completions in the right format: the reward named `format` gives a positive value.

    Without such a reward: an answer could be extracted. Where no reward extracts answers either, it is NaN.
    """

    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (completions in format, completions)."""
        known = [completion.format_ok for completion in result.completions if completion.format_ok is not None]
        return float(sum(known)), float(len(known))


class TruncationRate(ProblemMean):
    """Share of completions cut at the length limit."""

    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (truncated completions, completions)."""
        return float(sum(c.truncated for c in result.completions)), float(len(result.completions))


class CompletionLength(ProblemMean):
    """Mean length of completions, in tokens, the end token included."""

    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (tokens, completions)."""
        return float(sum(c.length for c in result.completions)), float(len(result.completions))


class Unscored(ProblemMean):
    """Number of completions that could not be scored."""

    def measure(self, result: ProblemResult) -> tuple[float, float]:
        """Return (unscored completions, 1)."""
        return float(len(result.completions) - len(_scored(result))), 1.0

    def compute(self) -> Tensor:
        """Return the sum over all ranks, float32."""
        return self._distinct()[:, 0].sum().float()


class EvalMetrics(MetricCollection):
    """Every metric of one evaluation set, by its logged name.

    `<stage>/<set>/` followed by `pass@<k>` for each of `ks`, `mean@<k>`, `maj@<k>`, `format`, `truncated`, `length`,
    `unscored`. `update` takes the `ProblemResult`s of a batch on every rank; `compute` is collective and returns the
    same numbers on every rank.

    Args:
        set_name: name of the evaluation set.
        k: completions per problem.
        ks: the k's of `pass@k`.
        stage: first part of the names.

    Example:
        >>> from distillkit.evaluation.results import CompletionResult
        >>> say = lambda answer, ok: CompletionResult(text=answer, correct=ok, answer=answer, truncated=False, length=3)
        >>> metrics = EvalMetrics("five", k=2, ks=(1, 2))
        >>> problem = dict(set_name="five", index=0, prompt="2+3=", gold="5")
        >>> metrics.update([ProblemResult(**problem, completions=(say("5", True), say("6", False)))])
        >>> {name: round(float(value), 2) for name, value in metrics.compute().items() if "@" in name}
        {'val/five/maj@2': 0.5, 'val/five/mean@2': 0.5, 'val/five/pass@1': 0.5, 'val/five/pass@2': 1.0}
    """

    def __init__(self, set_name: str, *, k: int, ks: Sequence[int], stage: str = "val") -> None:
        metrics: dict[str, Metric | MetricCollection] = {f"pass@{n}": PassAtK(n) for n in ks}
        metrics |= {f"mean@{k}": MeanAtK(), f"maj@{k}": MajAtK()}
        metrics |= {"format": FormatRate(), "truncated": TruncationRate(), "length": CompletionLength()}
        metrics["unscored"] = Unscored()
        # Groups would share the states of metrics that happen to agree on the first batch.
        super().__init__(metrics, prefix=f"{stage}/{set_name}/", compute_groups=False)


def _scored(result: ProblemResult) -> list[bool]:
    return [completion.correct for completion in result.completions if completion.correct is not None]
