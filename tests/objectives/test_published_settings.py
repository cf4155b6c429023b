"""GRPO, Dr. GRPO and DAPO as settings of one part, each against its paper's formula in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distillkit.functional.aggregation import denominator, token_coefficients
from distillkit.objectives.grpo import GRPO
from distillkit.testing import reward_output, rollout_batch
from distillkit.types import StudentScores

GROUPS = {"1+1=": ["2", "33", "414", "5"], "2=": ["7", "", "2222", "22"]}
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 1.0, 0.0]
LONGEST = 6

SETTINGS: dict[str, dict[str, Any]] = {
    "GRPO": {"std": True, "aggregation": "sequence", "clip_low": 0.2, "clip_high": 0.2, "correction": 0, "eps": 0.0},
    "Dr. GRPO": {"std": False, "aggregation": "constant", "constant_length": LONGEST},
    "DAPO": {"std": True, "aggregation": "token", "clip_low": 0.2, "clip_high": 0.28, "correction": 0, "eps": 0.0},
}


def formula(method: str, logprobs: list[list[float]], old: list[list[float]]) -> tuple[float, list[list[float]]]:
    """Loss and gradient in every token's log-prob, from the papers: no code of the package."""
    groups = [range(0, 4), range(4, 8)]
    high = 1.28 if method == "DAPO" else 1.2
    everything = sum(len(row) for row in logprobs)
    loss, slopes = 0.0, [[0.0] * len(row) for row in logprobs]
    for group in groups:
        mean = sum(REWARDS[i] for i in group) / 4
        std = math.sqrt(sum((REWARDS[i] - mean) ** 2 for i in group) / 4)
        for i in group:
            a = REWARDS[i] - mean if method == "Dr. GRPO" else (REWARDS[i] - mean) / std
            share = {"GRPO": 1 / (8 * len(logprobs[i])), "Dr. GRPO": 1 / (8 * LONGEST), "DAPO": 1 / everything}[method]
            for t, (new, before) in enumerate(zip(logprobs[i], old[i], strict=True)):
                r = math.exp(new - before)
                free, bound = r * a, min(max(r, 0.8), high) * a
                loss -= share * min(free, bound)
                slopes[i][t] = -share * free if free <= bound else 0.0
    return loss, slopes


@pytest.mark.parametrize("method", SETTINGS)
def test_settings_against_the_papers_formula(method: str) -> None:
    rollouts, part = rollout_batch(GROUPS, max_new_tokens=LONGEST), GRPO(**SETTINGS[method])
    mask = rollouts.loss_mask
    generator = torch.Generator().manual_seed(3)
    old = (-2 * torch.rand(mask.shape, generator=generator)).masked_fill(~mask, 0.0)
    moved = 0.8 * torch.rand(mask.shape, generator=generator) - 0.4
    logprobs = (old + moved).masked_fill(~mask, 0.0).requires_grad_()
    advantages = part.advantages(rollouts, reward_output(8, REWARDS), None)
    student = StudentScores(loss_mask=mask, logprobs=logprobs, distil_logprobs=logprobs)
    total = denominator(mask, part.aggregation, part.constant_length or 1)
    factors = token_coefficients(mask, torch.ones(mask.shape), part.aggregation, total)
    loss = (part.loss(student, old, None, advantages) * factors).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)

    def rows(grid: torch.Tensor) -> list[list[float]]:
        return [row[kept].tolist() for row, kept in zip(grid.detach(), mask, strict=True)]

    want, slopes = formula(method, rows(logprobs), rows(old))
    assert loss.item() == pytest.approx(want, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(rows(gradient), slopes, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)
    assert 0 < sum(s == 0 for row in slopes for s in row) < int(mask.sum())  # the clip binds somewhere


def test_the_documented_settings_are_these() -> None:
    """The table in the part's docstring, row by row."""
    table = {
        cells[0].strip("` "): [c.strip() for c in cells[1:]]
        for line in (GRPO.__doc__ or "").splitlines()
        if line.strip().startswith("| `") and (cells := line.strip().strip("|").split("|"))
    }
    columns = ["GRPO", "Dr. GRPO", "DAPO"]
    assert table["std"] == [str(SETTINGS[c]["std"]).lower() for c in columns]
    assert table["aggregation"] == [SETTINGS[c]["aggregation"] for c in columns]
    assert table["clip_high"] == [str(SETTINGS[c].get("clip_high", GRPO().clip_high)) for c in columns]
