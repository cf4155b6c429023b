"""What the papers claim, as comparisons that the small matrix can make, and the rule by which each is judged."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distillkit.evaluation import paired_bootstrap

__all__ = ["CLAIMS", "Claim", "Verdict", "judge"]

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Method -> its runs, one per seed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`first` is said to have more (`direction` 1) or less (-1) of `measure` than `second`."""

    source: str
    text: str
    first: str
    second: str
    measure: Literal["correct", "aligned", "length", "step_seconds"] = "correct"
    direction: Literal[1, -1] = 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Difference first − second, its 95 % interval over problems (None for figures without problems), and the word."""

    difference: float
    interval: tuple[float, float] | None
    by_seed: tuple[float, ...]
    word: Literal["held", "not held", "cannot be told at this scale"]


_KDRL = "KDRL, six benchmarks (second-hand)"
_RLAD = "RLAD, Knights and Knaves, 0.6B, 8K"
_RLKD = "RLKD, AIME24"
_SEQUENTIAL = "Sequential Beats Joint, logic"

CLAIMS: tuple[Claim, ...] = (
    Claim(source=_KDRL, text="KDRL beats GRPO: 56.8 against 54.6", first="kdrl_k2", second="grpo"),
    Claim(source=_KDRL, text="KDRL beats distillation alone: 56.8 against 56.1", first="kdrl_k2", second="kd_rkl"),
    Claim(source=_KDRL, text="distillation alone beats GRPO: 56.1 against 54.6", first="kd_rkl", second="grpo"),
    Claim(source=_KDRL, text="KDRL beats SFT: 56.8 against 51.5", first="kdrl_k2", second="sft"),
    Claim(source=_KDRL, text="annealing β helps: 57.2 against 56.8", first="kdrl_annealed", second="kdrl_k2"),
    Claim(source=_KDRL, text="k2 beats k3, by about 1.4 points", first="kdrl_k2", second="kdrl_k3"),
    Claim(
        source=_KDRL, text="the response-level mask shortens answers (by more than 1,400 tokens there)",
        first="kdrl_response_mask", second="kdrl_k2", measure="length", direction=-1,
    ),
    Claim(source=_RLAD, text="RLAD (α = 0.5) beats GRPO: .94 against .76", first="rlad_alpha_05", second="grpo"),
    Claim(source=_RLAD, text="RLAD (α = 0.5) beats KDRL: .94 against .92", first="rlad_alpha_05", second="kdrl_k2"),
    Claim(
        source="RLAD, MATH, α ablation", text="α = 0.5 beats the GRPO limit: 80.5 against 78.5",
        first="rlad_alpha_05", second="rlad_alpha_10",
    ),
    Claim(
        source="RLAD, MATH, α ablation", text="α = 0.5 beats α = 0.3: 80.5 against 80.3",
        first="rlad_alpha_05", second="rlad_alpha_03",
    ),
    Claim(
        source="RLAD, MATH, α ablation", text="α = 0.5 beats α = 0.7: 80.5 against 80.2",
        first="rlad_alpha_05", second="rlad_alpha_07",
    ),
    Claim(
        source="RLAD, 8B student, 32B teacher", text="the teacher makes a step dearer: 567 s against 491 s",
        first="rlad_alpha_05", second="grpo", measure="step_seconds",
    ),
    Claim(source=_RLKD, text="RLKD beats SFT followed by RL", first="rlkd", second="sft_then_rl"),
    Claim(source=_RLKD, text="RLKD beats reward-only training (GRPO)", first="rlkd", second="grpo"),
    Claim(
        source="RLKD, its purpose", text="the student takes over the structure of the teacher's traces",
        first="rlkd", second="grpo", measure="aligned",
    ),
    Claim(source=_SEQUENTIAL, text="OPD, then RL beats KDRL: 80.6 to 62.8", first="opd_then_rl", second="kdrl_k2"),
    Claim(source=_SEQUENTIAL, text="annealing helps KDRL: 68.9 to 62.8", first="kdrl_annealed", second="kdrl_k2"),
    Claim(source=_SEQUENTIAL, text="KDRL beats RLAD: 62.8 against 58.6", first="kdrl_k2", second="rlad_alpha_05"),
)  # fmt: skip


def judge(claim: Claim, runs: Runs) -> Verdict:
    """Compare two methods.

    A claim about problems holds when the 95 % paired bootstrap interval over the 500 problems (seeds averaged first)
    and the difference within each of the seeds lie on its side; it does not hold when both lie on the other. A claim
    about another figure is judged by the seeds alone: every run of one method must be beyond every run of the other.
    """
    first, second = runs[claim.first], runs[claim.second]
    if claim.measure in ("correct", "aligned"):
        ours, theirs = ([_per_problem(run, claim.measure) for run in side] for side in (first, second))
        by_seed = tuple(statistics.mean(a) - statistics.mean(b) for a, b in zip(ours, theirs, strict=True))
        found = paired_bootstrap(_mean_over_seeds(theirs), _mean_over_seeds(ours), seed=0)
        bounds: tuple[float, float] | None = (found.low, found.high)
        sides = [*by_seed, found.low, found.high]
    else:
        a, b = ([float(run[claim.measure]) for run in side] for side in (first, second))
        by_seed, bounds = tuple(x - y for x, y in zip(a, b, strict=True)), None
        sides = [x - y for x in a for y in b]
    signed = [claim.direction * value for value in sides]
    word: Any = "cannot be told at this scale"
    if all(value > 0 for value in signed):
        word = "held"
    elif all(value < 0 for value in signed):
        word = "not held"
    return Verdict(difference=statistics.mean(by_seed), interval=bounds, by_seed=by_seed, word=word)


def _per_problem(run: Mapping[str, Any], measure: str) -> list[float]:
    return [float(value) for value in run[measure]]


def _mean_over_seeds(runs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*runs, strict=True)]
