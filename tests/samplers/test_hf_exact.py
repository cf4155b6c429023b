"""`hf` against `generate`, a full forward and the exact distribution."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
import torch

from distillkit.types import RolloutBatch
from tests.samplers.tiny import (
    ARCHITECTURES,
    VOCABULARY,
    by_group,
    full_logprobs,
    generate,
    ids,
    requests,
    sampler,
    stops_at_several_times,
    student,
)

LENGTHS = [3, 17, 1, 9, 14]
"""Shorter and longer than the sliding window of 6."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name: str) -> None:
    model = student(name)
    asked = requests(LENGTHS, max_new_tokens=20)
    stop = stops_at_several_times([generate(model, r.prompt_ids, (), 20) for r in asked])
    expected = {r.group_id: [generate(model, r.prompt_ids, stop, 20)] for r in asked}
    assert len({len(rows[0]) for rows in expected.values()}) >= 3
    groups = list(sampler(model, stop=stop).sample(asked))
    assert ids(groups) == expected
    for group in groups:
        (rollout,) = group.rollouts
        ended = int(rollout.completion_ids[-1]) in stop
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert len(rollout.completion_ids) == 20 or ended


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_behaviour_logprobs_equal_a_full_forward(name: str, temperature: float) -> None:
    """80 tokens: every buffer of the cache is moved at least once; 4 rows at a time: new rows join a running batch."""
    model = student(name)
    asked = requests(LENGTHS, group_size=2, max_new_tokens=80, temperature=temperature)
    stop, limit = (7,), 40
    groups = list(sampler(model, stop=stop, vocab_limit=limit, rows_per_batch=4).sample(asked))
    lengths = {len(r.completion_ids) for g in groups for r in g.rollouts}
    assert len(groups) == len(LENGTHS) and (temperature == 0 or len(lengths) > 3)
    assert max(lengths) > 60
    for group in groups:
        for rollout in group.rollouts:
            exact = full_logprobs(
                model,
                group.request.prompt_ids,
                rollout.completion_ids.tolist(),
                temperature=temperature or 1.0,
                limit=limit,
            )
            assert rollout.behaviour_logprobs.dtype == torch.float32
            assert (rollout.behaviour_logprobs - exact).abs().max() < 1e-5


def test_logprobs_stand_at_their_tokens_in_the_padded_batch() -> None:
    model = student("qwen3")
    asked = requests(LENGTHS, group_size=3, max_new_tokens=9, temperature=1.0)
    groups = list(sampler(model, stop=(7, 11)).sample(asked))
    batch = RolloutBatch.from_groups(groups, pad_id=0)
    model.eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(batch.tokens, attention_mask=batch.attention_mask.long()).logits, dim=-1)
    exact = torch.zeros_like(batch.behaviour_logprobs)
    exact[:, 1:] = logprobs[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
    assert batch.loss_mask.sum() == batch.completion_lengths.sum() > 50
    assert (batch.behaviour_logprobs - exact * batch.loss_mask).abs().max() < 1e-5
    assert set(batch.policy_version[batch.loss_mask].tolist()) == {3}


def chi_square_p(observed: list[int], expected: list[float]) -> float:
    """P(χ² ≥ the statistic) = Q(k/2, χ²/2), the regularised upper incomplete gamma function, k = classes - 1."""
    assert min(expected) >= 5, "classes too rare for the approximation"
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def test_chi_square_p_agrees_with_tables() -> None:
    assert chi_square_p([105, 95], [100.0, 100.0]) == pytest.approx(math.erfc(0.5), rel=1e-9)
    assert chi_square_p([90, 100, 110], [100.0] * 3) == pytest.approx(math.exp(-1), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_frequencies_equal_the_exact_distribution(temperature: float) -> None:
    """12,000 rollouts of up to two tokens; one id of six ends, so a sequence is `end` or one of 5 · 6 pairs."""
    model, end, limit, count = student("llama", seed=3, initializer_range=0.08), 2, 6, 12_000
    asked = requests([4], group_size=count, max_new_tokens=2, temperature=temperature)
    (group,) = sampler(model, stop=(end,), vocab_limit=limit, rows_per_batch=5_000).sample(asked)
    seen = Counter(tuple(r.completion_ids.tolist()) for r in group.rollouts)

    def probabilities(at: float) -> dict[tuple[int, ...], float]:
        sequences = [(end,), *((a, b) for a, b in product(range(limit), repeat=2) if a != end)]
        prompt = group.request.prompt_ids
        return {
            s: math.exp(full_logprobs(model, prompt, s, temperature=at, limit=limit).sum().item()) for s in sequences
        }

    exact = probabilities(temperature)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-6)
    assert set(seen) <= set(exact) and len(exact) == 31
    assert chi_square_p([seen[s] for s in exact], [count * p for p in exact.values()]) > 1e-3
    first = [sum(p for s, p in exact.items() if s[0] == a) * count for a in range(limit)]
    assert chi_square_p([sum(n for s, n in seen.items() if s[0] == a) for a in range(limit)], first) > 1e-3
    # The test can tell: the same counts are impossible at another temperature.
    other = probabilities(temperature * 1.3)
    assert chi_square_p([seen[s] for s in other], [count * p for p in other.values()]) < 1e-6


def test_greedy_ignores_padding_tokens_that_the_prompt_contains() -> None:
    """The pad id is also the end id and occurs in the prompts: what is padding is decided by position, never by id."""
    model = student("qwen3")
    asked = requests([4, 12, 7])
    asked = [type(r)(**(vars(r) | {"prompt_ids": (r.prompt_ids[0], 1, *r.prompt_ids[2:], 1)})) for r in asked]
    groups = list(sampler(model, stop=(1,), pad=1).sample(asked))
    assert ids(groups) == {r.group_id: [generate(model, r.prompt_ids, (1,), 12)] for r in asked}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_the_shared_vocabulary_are_never_emitted(temperature: float) -> None:
    model, limit = student("llama"), 30
    boost = torch.zeros(VOCABULARY).index_fill(0, torch.arange(limit, VOCABULARY), 50.0)
    model.lm_head.register_forward_hook(lambda module, args, out: out + boost)
    asked = requests([5, 8], group_size=16, max_new_tokens=10, temperature=temperature)
    groups = list(sampler(model, vocab_limit=limit).sample(asked))
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.completion_ids.max() < limit
            exact = full_logprobs(
                model,
                group.request.prompt_ids,
                rollout.completion_ids.tolist(),
                temperature=1.0,
                limit=limit,
            )
            assert (rollout.behaviour_logprobs - exact).abs().max() < 1e-5
    emitted = {t for rows in ids(groups).values() for row in rows for t in row}
    assert temperature == 0 or len(emitted) > 10


def test_the_nucleus_is_kept_and_renormalised() -> None:
    model, top_p, limit = student("qwen3"), 0.6, VOCABULARY
    asked = requests([6], group_size=400, max_new_tokens=1, temperature=0.8, top_p=top_p)
    groups = list(sampler(model, stop=()).sample(asked))
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([asked[0].prompt_ids])).logits[0, -1, :limit].double() / 0.8
    probs = torch.softmax(logits, dim=-1)
    ranked, order = probs.sort(descending=True)
    size = int((ranked.cumsum(0) < top_p).sum()) + 1
    nucleus = dict(zip(order[:size].tolist(), (ranked[:size] / ranked[:size].sum()).tolist(), strict=True))
    assert 1 < size < limit
    rollouts = by_group(groups)[50]
    assert {int(r.completion_ids[0]) for r in rollouts} == set(nucleus)
    for rollout in rollouts:
        assert rollout.behaviour_logprobs.item() == pytest.approx(
            math.log(nucleus[int(rollout.completion_ids[0])]), abs=1e-5
        )
