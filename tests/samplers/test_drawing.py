"""One random token per row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from distillkit.samplers.drawing import draw_tokens, row_uniforms


@pytest.mark.parametrize("vocabulary", [1, 5, 256, 257, 1000])
def test_a_draw_inverts_the_distribution_function(vocabulary: int) -> None:
    """Against float64 numpy: the smallest id whose cumulative probability exceeds the uniform number."""
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, logprobs = draw_tokens(logits.expand(4000, -1), uniforms, temperature=1.3)
    scaled = logits[0].double().numpy() / 1.3
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    cumulative = probs.cumsum()
    # float32 probabilities: a number within 1e-6 of a border may fall on either side of it.
    low, high = (np.searchsorted(cumulative, uniforms.numpy() + e, side="right") for e in (-1e-6, 1e-6))
    assert ((ids.numpy() >= low) & (ids.numpy() <= high.clip(max=vocabulary - 1))).all()
    assert (low == high).mean() > 0.9
    assert np.abs(logprobs.numpy() - np.log(probs[ids.numpy()])).max() < 2e-6


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("vocabulary", [6, 700])
def test_an_id_of_probability_zero_is_never_drawn(number: float, vocabulary: int) -> None:
    """Zeros at both ends, in a whole block, and everywhere but at one id."""
    uniforms = torch.full((1,), number, dtype=torch.float64)
    for allowed in ([2, 3], [vocabulary - 2], [1, vocabulary - 3]):
        logits = torch.full((1, vocabulary), -torch.inf)
        logits[0, allowed] = torch.tensor([0.3, -2.0])[: len(allowed)]
        ids, logprobs = draw_tokens(logits, uniforms, temperature=1.0)
        assert ids.item() == (allowed[0] if number <= 0.5 else allowed[-1])
        assert torch.isfinite(logprobs).all()


def test_rounding_at_a_border_never_draws_an_id_of_probability_zero() -> None:
    """Numbers on and beside the border of each block of 256 ids; blocks begin with a zero, one is empty."""
    logits = torch.randn(400, 2048, generator=torch.Generator().manual_seed(0)) * 20
    logits[:, ::256] = -torch.inf
    logits[:, 512:768] = -torch.inf
    mass = torch.softmax(logits, dim=-1).reshape(400, -1, 256).sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    for border in (mass / mass[:, -1:]).T:
        for towards in (0.0, 0.5, 2.0):
            number = torch.nextafter(border, torch.full_like(border, towards)).clamp(0, 1 - 2**-53)
            ids, logprobs = draw_tokens(logits, number, temperature=1.0)
            assert torch.isfinite(logprobs).all() and (ids % 256 != 0).all()


def test_a_row_without_finite_logits_reports_it() -> None:
    ids, logprobs = draw_tokens(torch.full((1, 300), torch.nan), torch.tensor([0.5]).double(), temperature=1.0)
    assert 0 <= ids.item() < 300 and logprobs.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_normalised_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    uniforms = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for temperature in (0.0, 0.5):
        ids, logprobs = draw_tokens(logits, uniforms, temperature=temperature)
        exact = torch.log_softmax(logits.double() / (temperature or 1.0), dim=-1).gather(1, ids[:, None])[:, 0]
        assert logprobs.dtype == torch.float32 and (logprobs - exact).abs().max() < 1e-6


def test_greedy_takes_the_mode_and_reads_no_numbers() -> None:
    ids, logprobs = draw_tokens(torch.tensor([[0.0, 2.0, 1.0]]), None, temperature=0.0)
    assert ids.tolist() == [1]
    assert logprobs.item() == pytest.approx(-np.log(1 + np.exp(-2) + np.exp(-1)))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_equals_transformers_own(top_p: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    kept = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), logits.clone())
    exact = torch.log_softmax(kept, dim=-1)[0]
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ids, logprobs = draw_tokens(logits.expand(len(grid), -1), grid, temperature=1.0, top_p=top_p)
    assert set(ids.tolist()) == set(torch.isfinite(exact).nonzero()[:, 0].tolist())
    assert (logprobs - exact[ids]).abs().max() < 1e-6
    assert (torch.bincount(ids, minlength=40) / len(grid) - exact.exp()).abs().max() < 1e-4


def test_the_numbers_depend_on_all_of_the_seed_and_on_the_rollout() -> None:
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, -1]
    rows = {(seed, g): row_uniforms(seed, g, 4).tobytes() for seed in seeds for g in range(3)}
    assert len(set(rows.values())) == len(rows)
    assert (row_uniforms(5, 2, 9)[:4] == row_uniforms(5, 2, 4)).all()
    numbers = np.concatenate([row_uniforms(7, g, 50) for g in range(200)])
    assert numbers.min() >= 0 and numbers.max() < 1
    # Mean 1/2 and variance 1/12 of 10,000 uniform numbers, within four standard errors.
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / 10_000) ** 0.5
    assert abs(numbers.var() - 1 / 12) < 4 * (1 / 180 / 10_000) ** 0.5
