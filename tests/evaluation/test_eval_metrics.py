"""Each metric against numbers worked out by hand or by enumerating every draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch

from distillkit.evaluation import CompletionResult, EvalMetrics, ProblemResult
from distillkit.evaluation.metrics import (
    CompletionLength,
    FormatRate,
    MajAtK,
    MeanAtK,
    PassAtK,
    ProblemMean,
    TruncationRate,
    Unscored,
    pass_at_k,
)

Said = tuple[str | None, bool | None]


def result(said: Sequence[Said], *, index: int = 0, valid: bool = True, extracts: bool = True) -> ProblemResult:
    """A problem answered with (answer, correct) pairs; an answer of None was looked for and not found."""
    completions = tuple(
        CompletionResult(
            text=str(answer),
            correct=correct,
            answer=answer,
            truncated=answer is None,
            length=10 + i,
            format_ok=None if not extracts else answer is not None,
            status={
                "r": "timed_out" if correct is None else "unparseable" if extracts and answer is None else "scored"
            },
        )
        for i, (answer, correct) in enumerate(said)
    )
    return ProblemResult(set_name="s", index=index, prompt="p", gold="g", completions=completions, valid=valid)


def value(metric: ProblemMean, *results: ProblemResult) -> float:
    metric.update(results)
    return float(metric.compute())


RIGHT, WRONG, NONE, HUNG = ("5", True), ("6", False), (None, False), (None, None)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_enumeration_of_all_draws(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        exact = Fraction(sum(any(draw) for draw in draws), len(draws))
        assert math.isclose(pass_at_k(n, c, k), exact, rel_tol=0, abs_tol=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    # E over c ~ Binomial(n, p) of the estimate is the chance that k independent tries contain a success: 1 - (1 - p)^k.
    n, p = 9, 0.3
    for k in (1, 2, 5, 9):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert math.isclose(mean, 1 - (1 - p) ** k, rel_tol=1e-12)


def test_pass_at_k_of_many_completions_does_not_overflow() -> None:
    assert math.isclose(pass_at_k(4096, 1, 1024), 0.25, rel_tol=1e-12)


def test_pass_metric_averages_problems_and_leaves_out_those_with_too_few_scored() -> None:
    four = result([RIGHT, WRONG, WRONG, WRONG], index=0)
    three = result([RIGHT, RIGHT, WRONG, HUNG], index=1)
    assert value(PassAtK(1), four, three) == pytest.approx((1 / 4 + 2 / 3) / 2, abs=1e-6)
    assert value(PassAtK(3), four, three) == pytest.approx((3 / 4 + 1) / 2, abs=1e-6)
    assert value(PassAtK(4), four, three) == 1.0
    assert math.isnan(value(PassAtK(4), three))


def test_mean_at_k_is_over_scored_completions() -> None:
    assert value(MeanAtK(), result([RIGHT, WRONG, HUNG, HUNG]), result([WRONG, NONE], index=1)) == 0.25
    assert value(MeanAtK(), result([RIGHT]), result([HUNG, HUNG], index=1)) == 1.0
    assert math.isnan(value(MeanAtK(), result([HUNG])))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([RIGHT, RIGHT, WRONG], 1.0),
        ([RIGHT, WRONG, WRONG], 0.0),
        # One majority of three against single right answers: the vote is by answer, not by verdict.
        ([RIGHT, RIGHT, ("6", False), ("7", False), ("8", False)], 1.0),
        # Ties: the share of the tied answers that are correct.
        ([RIGHT, WRONG], 0.5),
        ([WRONG, RIGHT], 0.5),
        ([RIGHT, ("6", False), ("7", False)], 1 / 3),
        # No answer is no vote; nor is a completion that could not be scored.
        ([RIGHT, NONE, NONE, NONE], 1.0),
        ([RIGHT, ("6", None), ("6", None)], 1.0),
        ([NONE, NONE], 0.0),
    ],
)
def test_majority(said: list[Said], expected: float) -> None:
    assert value(MajAtK(), result(said)) == pytest.approx(expected, abs=1e-6)


def test_majority_of_a_set() -> None:
    hung = result([HUNG, HUNG], index=2)
    assert value(MajAtK(), result([RIGHT]), result([NONE], index=1), hung) == 0.5
    assert math.isnan(value(MajAtK(), result([(None, True), (None, False)], extracts=False)))


def test_rates_and_lengths_count_completions() -> None:
    results = [result([RIGHT, NONE, NONE]), result([RIGHT], index=1)]
    assert value(FormatRate(), *results) == 0.5
    assert value(TruncationRate(), *results) == 0.5
    assert value(CompletionLength(), *results) == (10 + 11 + 12 + 10) / 4
    assert math.isnan(value(FormatRate(), result([RIGHT], extracts=False)))


def test_unscored_are_counted() -> None:
    assert value(Unscored(), result([RIGHT, HUNG, HUNG]), result([HUNG], index=1), result([WRONG], index=2)) == 3


def test_a_problem_counts_once() -> None:
    right, wrong = result([RIGHT], index=0), result([WRONG], index=1)
    filler = result([RIGHT], index=0, valid=False)
    again = result([RIGHT], index=0)
    metric = MeanAtK()
    for results in ([right], [wrong], [filler], [again], [filler, again]):
        metric.update(results)
    assert float(metric.compute()) == 0.5


def test_nothing_seen_is_nan_and_reset_forgets() -> None:
    metric = MeanAtK()
    assert value(metric, result([RIGHT])) == 1.0
    metric.reset()
    assert math.isnan(value(metric, result([RIGHT], valid=False)))
    assert value(metric, result([WRONG])) == 0.0


def test_names_and_values_of_a_set() -> None:
    metrics = EvalMetrics("gsm8k", k=4, ks=(1, 2, 4))
    metrics.update([result([RIGHT, RIGHT, WRONG, NONE]), result([WRONG, WRONG, WRONG, HUNG], index=1)])
    computed = {name: float(number) for name, number in metrics.compute().items()}
    assert computed == pytest.approx(
        {
            "val/gsm8k/pass@1": 0.25,
            "val/gsm8k/pass@2": (5 / 6) / 2,
            "val/gsm8k/pass@4": 1.0,
            "val/gsm8k/mean@4": 0.25,
            "val/gsm8k/maj@4": 0.5,
            "val/gsm8k/format": 6 / 8,
            "val/gsm8k/truncated": 2 / 8,
            "val/gsm8k/length": 11.5,
            "val/gsm8k/unscored": 1.0,
        },
        abs=1e-6,
    )
    testing = EvalMetrics("gsm8k", k=1, ks=(1,), stage="test")
    testing.update([result([RIGHT])])
    assert all(name.startswith("test/gsm8k/") for name in testing.compute())


def test_metrics_add_nothing_to_a_checkpoint() -> None:
    metrics = EvalMetrics("gsm8k", k=1, ks=(1,))
    metrics.update([result([RIGHT])])
    assert not metrics.state_dict()


def test_large_sets_are_exact_to_float32() -> None:
    torch.manual_seed(0)
    shares = torch.randint(0, 5, (3000,)).tolist()
    results = [result([RIGHT] * c + [WRONG] * (4 - c), index=i) for i, c in enumerate(shares)]
    assert value(MeanAtK(), *results) == pytest.approx(sum(shares) / 4 / 3000, rel=1e-6)
