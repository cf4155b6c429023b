"""Log-probabilities against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from distillkit.functional.logprobs import entropy, log_softmax, scatter_tokens, token_logprobs


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_token_logprobs_and_entropy_against_plain_sums(temperature: float) -> None:
    logits = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(1))
    got, spread = token_logprobs(logits, ids, temperature), entropy(logits, temperature)
    for i in range(3):
        for j in range(4):
            weights = [math.exp(z / temperature) for z in logits[i, j].tolist()]
            p = [w / sum(weights) for w in weights]
            assert got[i, j].item() == pytest.approx(math.log(p[int(ids[i, j])]), rel=1e-12)
            assert spread[i, j].item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-12)


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for got in (log_softmax(logits), token_logprobs(logits, torch.arange(5)), entropy(logits)):
        assert got.dtype == torch.float32
    assert log_softmax(logits).exp().sum(-1).sub(1).abs().max() < 1e-5


def test_extreme_logits_stay_finite_with_their_gradient() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = token_logprobs(logits, torch.tensor([1]), 0.1).sum() + entropy(logits, 0.1).sum()
    value.backward()
    assert value.item() == pytest.approx(-2e5) and logits.grad is not None and logits.grad.isfinite().all()


def test_scatter_puts_values_back_and_carries_gradient() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = scatter_tokens(values, mask)
    assert grid.tolist() == [[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad((grid * torch.tensor([[9.0, 2.0, 3.0], [4.0, 9.0, 9.0]])).sum(), values)
    assert gradient.tolist() == [2.0, 3.0, 4.0]
    rows = scatter_tokens(torch.arange(6.0).reshape(3, 2), mask)
    assert rows.shape == (2, 3, 2) and rows[0, 2].tolist() == [2.0, 3.0] and rows[1, 1].tolist() == [0.0, 0.0]
    assert torch.equal(scatter_tokens(torch.zeros(0), torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 3))
