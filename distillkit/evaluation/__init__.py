"""Evaluation sets: answer, judge, measure, keep.

`evaluate` (sample and judge a batch of problems), `metrics` (pass@k, mean@k, maj@k and others over ranks), `results`
(what is recorded about a problem, and the file `eval/<set>.jsonl`), `bootstrap` (how sure a difference is).
"""

from __future__ import annotations

from distillkit.evaluation.bootstrap import Interval, paired_bootstrap
from distillkit.evaluation.evaluate import evaluate_batch, gather_results
from distillkit.evaluation.metrics import EvalMetrics
from distillkit.evaluation.results import CompletionResult, ProblemResult, read_results, write_results

__all__ = [
    "CompletionResult",
    "EvalMetrics",
    "Interval",
    "ProblemResult",
    "evaluate_batch",
    "gather_results",
    "paired_bootstrap",
    "read_results",
    "write_results",
]
