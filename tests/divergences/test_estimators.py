"""Divergence parts: the right function, the right request, and refusals that say what works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distillkit.components import DivergenceEstimator
from distillkit.divergences.full import JSD, ForwardKL, ReverseKL
from distillkit.divergences.power import PowerDivergence
from distillkit.divergences.sampled import K1, K2, K3
from distillkit.divergences.skew import SkewForwardKL, SkewReverseKL
from distillkit.divergences.todi import ToDi
from distillkit.divergences.topk import TopK
from distillkit.errors import ConfigError, ContractError
from distillkit.functional import divergences as functional
from distillkit.functional.power_divergence import power
from distillkit.types import ScoreRequest, TokenScores


def both(field: str, *shape: int) -> tuple[TokenScores, TokenScores]:
    draws = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))).unbind(0)
    if field != "logits":
        draws = tuple(d.log_softmax(-1) - 0.1 for d in draws)
    return TokenScores(**{field: draws[0]}), TokenScores(**{field: draws[1]})


SAMPLED, TOPK, FULL = both("sampled", 5), both("topk", 5, 3), both("logits", 5, 7)


@pytest.mark.parametrize(
    ("part", "scores", "want", "needs"),
    [
        (K1(), SAMPLED, functional.k1, ScoreRequest(sampled=True)),
        (K2(), SAMPLED, functional.k2, ScoreRequest(sampled=True)),
        (K2(bound=0.3), SAMPLED, lambda s, t: functional.bounded_k2(s, t, 0.3), ScoreRequest(sampled=True)),
        (K3(), SAMPLED, functional.k3, ScoreRequest(sampled=True)),
        (ForwardKL(), FULL, functional.forward_kl, ScoreRequest(full=True)),
        (ReverseKL(), FULL, functional.reverse_kl, ScoreRequest(full=True)),
        (JSD(teacher_weight=0.2), FULL, lambda s, t: functional.jsd(s, t, 0.2), ScoreRequest(full=True)),
        (SkewForwardKL(), FULL, functional.skew_forward_kl, ScoreRequest(full=True)),
        (SkewForwardKL(weight=0.4), FULL, lambda s, t: functional.skew_forward_kl(s, t, 0.4), ScoreRequest(full=True)),
        (SkewReverseKL(), FULL, functional.skew_reverse_kl, ScoreRequest(full=True)),
        (SkewReverseKL(weight=0.4), FULL, lambda s, t: functional.skew_reverse_kl(s, t, 0.4), ScoreRequest(full=True)),
        (ToDi(), FULL, functional.todi, ScoreRequest(full=True)),
        (PowerDivergence(), FULL, power, ScoreRequest(full=True)),
        (PowerDivergence(exponent=-0.5), FULL, lambda s, t: power(s, t, -0.5), ScoreRequest(full=True)),
        (TopK(k=3), TOPK, functional.topk_reverse_kl, ScoreRequest(topk=3)),
        (TopK(k=3, direction="forward"), TOPK, functional.topk_forward_kl, ScoreRequest(topk=3)),
        (TopK(k=3, tail=False), TOPK, lambda s, t: functional.topk_reverse_kl(s, t, False), ScoreRequest(topk=3)),
        (TopK(k=3, chosen_by="student"), TOPK, functional.topk_reverse_kl, ScoreRequest(student_topk=3)),
    ],
)
def test_each_part_is_its_function(
    part: DivergenceEstimator, scores: tuple[TokenScores, TokenScores], want: object, needs: ScoreRequest
) -> None:
    sides: list[Tensor] = [next(t for t in vars(side).values() if t is not None) for side in scores]
    assert torch.equal(part(*scores), want(*sides))  # type: ignore[operator]
    assert part.needs == needs


def test_defaults() -> None:
    assert TopK().needs == ScoreRequest(topk=64) and TopK().tail and TopK().direction == "reverse"
    assert JSD().teacher_weight == 0.5 and K2().bound is None
    assert SkewForwardKL().weight == SkewReverseKL().weight == 0.1 and PowerDivergence().exponent == 2 / 3


ZERO_LOSS = "its expected gradient as a loss is zero: set model.distill_through: advantage"
NO_TOKEN = (
    "it does not depend on the sampled token, so its expected gradient as an advantage is zero: "
    "set model.distill_through: loss, or model.divergence: k1"
)
BLIND = (
    "as an advantage or reward it would push down the tokens that the teacher prefers as hard as those it rejects: "
    "set model.distill_through: loss, or model.divergence: k1"
)


@pytest.mark.parametrize(
    ("cls", "allowed", "why"),
    [
        (K1, ("advantage", "reward"), ZERO_LOSS),
        (K2, ("loss",), BLIND),
        (K3, ("loss",), BLIND),
        (ForwardKL, ("loss", "reward"), NO_TOKEN),
        (ReverseKL, ("loss", "reward"), NO_TOKEN),
        (JSD, ("loss", "reward"), NO_TOKEN),
        (SkewForwardKL, ("loss", "reward"), NO_TOKEN),
        (SkewReverseKL, ("loss", "reward"), NO_TOKEN),
        (ToDi, ("loss", "reward"), NO_TOKEN),
        (PowerDivergence, ("loss", "reward"), NO_TOKEN),
        (TopK, ("loss", "reward"), NO_TOKEN),
    ],
)
def test_how_each_may_reach_the_gradient(cls: type[DivergenceEstimator], allowed: tuple[str, ...], why: str) -> None:
    assert cls.allowed_through == allowed
    assert cls.why_not == why


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: JSD(teacher_weight=0.0),
            "model.divergence.teacher_weight: the divergence is 0 at both ends\n"
            "    got:      0.0\n"
            "    expected: 0 < teacher_weight < 1\n"
            "    try:      model.divergence: forward_kl",
        ),
        (
            lambda: JSD(teacher_weight=1.0),
            "model.divergence.teacher_weight: the divergence is 0 at both ends\n"
            "    got:      1.0\n"
            "    expected: 0 < teacher_weight < 1\n"
            "    try:      model.divergence: reverse_kl",
        ),
        (
            lambda: K2(bound=0.0),
            "model.divergence.bound: the gradient's bound is a positive number of nats\n"
            "    got:      0.0\n"
            "    expected: > 0, or null for no bound\n"
            "    try:      5.0",
        ),
        (
            lambda: SkewForwardKL(weight=1.0),
            "model.divergence.weight: at 1 both sides are the same and the divergence is 0\n"
            "    got:      1.0\n"
            "    expected: 0 <= weight < 1\n"
            "    try:      0.1, or model.divergence: forward_kl for none",
        ),
        (
            lambda: SkewReverseKL(weight=-0.5),
            "model.divergence.weight: at 1 both sides are the same and the divergence is 0\n"
            "    got:      -0.5\n"
            "    expected: 0 <= weight < 1\n"
            "    try:      0.1, or model.divergence: reverse_kl for none",
        ),
        (
            lambda: PowerDivergence(exponent=float("nan")),
            "model.divergence.exponent\n    got:      nan\n    expected: a finite number",
        ),
        (lambda: TopK(k=0), "model.divergence.k\n    got:      0\n    expected: at least 1 token"),
        (
            lambda: TopK(direction="both"),  # type: ignore[arg-type]
            "model.divergence.direction\n    got:      both\n    expected: reverse or forward",
        ),
        (
            lambda: TopK(chosen_by="coin"),  # type: ignore[arg-type]
            "model.divergence.chosen_by\n    got:      coin\n    expected: teacher or student",
        ),
    ],
    ids=["jsd 0", "jsd 1", "bound", "skew 1", "skew below 0", "exponent", "k", "direction", "chosen_by"],
)
def test_bad_arguments_are_refused(make: object, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()  # type: ignore[operator]
    assert str(error.value) == text


def test_missing_scores_are_named() -> None:
    with pytest.raises(ContractError) as error:
        TopK()(TokenScores(topk=torch.zeros(4, 64)), TokenScores(sampled=torch.zeros(4)))
    assert str(error.value) == (
        "TopK: TokenScores.topk\n    got:      student (4, 64), teacher None\n    expected: one shape on both sides"
    )


def test_scheduled_numbers_change_a_copy() -> None:
    part = K2(bound=2.0)
    assert part.at({"bound": 1.0})(*SAMPLED).equal(K2(bound=1.0)(*SAMPLED)) and part.bound == 2.0
    power_part = PowerDivergence()
    assert power_part.at({"exponent": -1.0})(*FULL).equal(ReverseKL()(*FULL)) and power_part.exponent == 2 / 3


def test_a_scheduled_skew_outside_its_range_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        SkewReverseKL().at({"weight": 1.25})(*FULL)
    assert str(error.value) == (
        "skew_reverse_kl.weight\n    got:      1.25\n    expected: 0 <= weight < 1 (at 1 the divergence is 0)\n"
        "    try:      0.1"
    )
