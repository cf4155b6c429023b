"""Coefficients against each aggregation's formula, in one plain loop and split every which way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distillkit.functional.aggregation import Aggregation, denominator, token_coefficients

AGGREGATIONS: tuple[Aggregation, ...] = ("token", "sequence", "constant")


def case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    eligible = torch.rand(9, 6, generator=generator) < 0.6
    eligible[4] = False  # nothing to learn in this rollout
    weights = (torch.rand(9, 6, generator=generator) < 0.7).float() * (1 + torch.rand(9, 6, generator=generator))
    return eligible, weights, torch.randn(9, 6, generator=generator, dtype=torch.float64)


def formula(eligible: Tensor, weights: Tensor, losses: Tensor, aggregation: Aggregation, constant: int) -> float:
    """The definition, over python numbers."""
    sums, counts = [], []
    for row in range(len(eligible)):
        here = [t for t in range(eligible.shape[1]) if eligible[row, t]]
        sums.append(sum(float(weights[row, t]) * float(losses[row, t]) for t in here))
        counts.append(len(here))
    rollouts = sum(1 for count in counts if count)
    if aggregation == "token":
        return sum(sums) / sum(counts)
    if aggregation == "sequence":
        return sum(s / c for s, c in zip(sums, counts, strict=True) if c) / rollouts
    return sum(sums) / (rollouts * constant)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_each_aggregation_is_its_formula(aggregation: Aggregation) -> None:
    eligible, weights, losses = case()
    total = denominator(eligible, aggregation, 50)
    value = (token_coefficients(eligible, weights, aggregation, total).double() * losses).sum()
    assert value.item() == pytest.approx(formula(eligible, weights, losses, aggregation, 50), rel=1e-6)


def test_the_aggregations_differ() -> None:
    eligible, weights, losses = case()
    assert len({round(formula(eligible, weights, losses, a, 50), 6) for a in AGGREGATIONS}) == 3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("split", [[9], [4, 5], [1] * 9, [3, 3, 3], [0, 9], [8, 1]])
def test_any_split_gives_the_same_coefficients(aggregation: Aggregation, split: list[int]) -> None:
    """Micro-batches and ranks alike: shares of the denominator are summed first, then each part is weighted alone."""
    eligible, weights, _ = case()
    whole = token_coefficients(eligible, weights, aggregation, denominator(eligible, aggregation, 50))
    shares = [denominator(part, aggregation, 50) for part in eligible.split(split)]
    total = torch.stack(shares).sum()
    parts = [
        token_coefficients(e, w, aggregation, total)
        for e, w in zip(eligible.split(split), weights.split(split), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_changes_nothing(aggregation: Aggregation) -> None:
    eligible, weights, _ = case()
    wider = [torch.nn.functional.pad(x.float(), (0, 5)) for x in (eligible, weights)]
    total = denominator(wider[0].bool(), aggregation, 50)
    assert total == denominator(eligible, aggregation, 50)
    got = token_coefficients(wider[0].bool(), wider[1], aggregation, total)
    assert torch.equal(got[:, :6], token_coefficients(eligible, weights, aggregation, total))
    assert (got[:, 6:] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masking_does_not_raise_what_is_kept(aggregation: Aggregation) -> None:
    """The denominator counts before the masker: dropping half of the tokens leaves the others' coefficients alone."""
    eligible = torch.ones(4, 6, dtype=torch.bool)
    weights = torch.ones(4, 6)
    weights[:2] = 0
    total = denominator(eligible, aggregation, 50)
    masked = token_coefficients(eligible, weights, aggregation, total)
    everything = token_coefficients(eligible, torch.ones(4, 6), aggregation, total)
    assert torch.equal(masked[2:], everything[2:]) and (masked[:2] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_eligible_gives_zero_and_not_nan(aggregation: Aggregation) -> None:
    eligible, weights = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4)
    total = denominator(eligible, aggregation, 50)
    assert total.item() == 0
    assert torch.equal(token_coefficients(eligible, weights, aggregation, total), torch.zeros(3, 4))
    assert denominator(torch.zeros(0, 4, dtype=torch.bool), aggregation, 50).item() == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_one_fully_masked_part_gives_zero_and_not_nan(aggregation: Aggregation) -> None:
    eligible = torch.zeros(3, 4, dtype=torch.bool)
    got = token_coefficients(eligible, torch.ones(3, 4), aggregation, 7.0)  # other ranks have tokens
    assert torch.equal(got, torch.zeros(3, 4))


def test_coefficients_are_detached_float32() -> None:
    got = token_coefficients(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, requires_grad=True), "token", 2.0)
    assert got.dtype == torch.float32 and not got.requires_grad


def test_counts_above_float32s_integers_stay_exact() -> None:
    # 2^24 + 1 tokens: a float32 sum would lose the last one.
    assert denominator(torch.ones(1, 2**24 + 1, dtype=torch.bool), "token").item() == 2**24 + 1
