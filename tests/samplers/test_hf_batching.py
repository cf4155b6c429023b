"""How `hf` fills its batch, what its outputs depend on, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from distillkit.samplers import decoding
from distillkit.types import RolloutGroup
from tests.samplers.tiny import by_group, generate, ids, requests, sampler, stops_at_several_times, student

LENGTHS = [3, 17, 1, 9, 14]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[int, int, int]]]:
    """(rows, new tokens per row, real tokens among them) of each forward."""
    calls: list[tuple[int, int, int]] = []

    def look(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        rows, new = kwargs["input_ids"].shape
        mask = kwargs["attention_mask"]  # none where no row has padding
        calls.append((rows, new, rows * new if mask is None else int(mask[:, -new:].sum())))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def close(one: list[RolloutGroup], other: list[RolloutGroup]) -> bool:
    """Same tokens, and log-probs within rounding."""
    assert ids(one) == ids(other)
    pairs = [(a, b) for i, rows in by_group(one).items() for a, b in zip(rows, by_group(other)[i], strict=True)]
    return all((a.behaviour_logprobs - b.behaviour_logprobs).abs().max() < 1e-5 for a, b in pairs)


def test_a_prompt_is_prefilled_once_for_its_group() -> None:
    model = student("qwen3")
    asked = requests([6, 6, 6], group_size=4, max_new_tokens=7, temperature=1.0)
    with watched(model) as calls:
        groups = list(sampler(model, stop=(7, 11, 20)).sample(asked))
    assert calls[0] == (3, 6, 18), "one forward over the three prompts, nothing repeated"
    assert all(new == 1 for _, new, _ in calls[1:])
    # The last token of a rollout is drawn, never fed.
    fed = sum(len(r.completion_ids) - 1 for g in groups for r in g.rollouts)
    assert sum(rows for rows, _, _ in calls[1:]) == fed > 0


@pytest.mark.parametrize("rows_per_batch", [1, 3, 5])
def test_a_prompt_is_prefilled_once_when_its_group_does_not_fit(rows_per_batch: int) -> None:
    model = student("mistral")
    asked = requests(LENGTHS, group_size=4, max_new_tokens=7, temperature=1.0)
    with watched(model) as calls:
        list(sampler(model, stop=(7, 11, 20), rows_per_batch=rows_per_batch).sample(asked))
    assert sum(real for _, new, real in calls if new > 1) + sum(n == 1 for n in LENGTHS) == sum(LENGTHS)
    assert max(rows for rows, _, _ in calls) <= rows_per_batch


def test_finished_rows_leave_the_batch() -> None:
    """At each step the batch is exactly the rows that are unfinished."""
    model = student("llama")
    asked = requests(LENGTHS, group_size=3, max_new_tokens=25, temperature=1.0)
    with watched(model) as calls:
        groups = list(sampler(model, stop=(7, 11, 20, 25)).sample(asked))
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    assert len(set(lengths)) > 5
    assert [rows for rows, _, _ in calls[1:]] == [sum(n > t for n in lengths) for t in range(1, max(lengths))]


def test_the_cache_shrinks_when_the_longest_row_leaves() -> None:
    model = student("llama")
    asked = requests([17, 3], max_new_tokens=20)
    long, short = (generate(model, r.prompt_ids, (), 20) for r in asked)
    stop = next(t for t in long[3:] if t not in short and t not in long[:3])
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(
            kwargs["past_key_values"].get_seq_length() + kwargs["input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    groups = list(sampler(model, stop=(stop,)).sample(asked))
    drawn = long.index(stop) + 1
    assert ids(groups) == {50: [long[:drawn]], 51: [short]}
    assert widths == [17, *(17 + t for t in range(1, drawn)), *(3 + t for t in range(drawn, 20))]


def test_waiting_rollouts_take_the_places_of_finished_ones() -> None:
    model = student("llama")
    asked = requests([5] * 12, group_size=2, max_new_tokens=15, temperature=1.0)
    with watched(model) as calls:
        groups = list(sampler(model, stop=(7, 11, 20), rows_per_batch=6).sample(asked))
    lengths = [len(r.completion_ids) for g in groups for r in g.rollouts]
    steps = [rows for rows, new, _ in calls if new == 1]
    assert sum(steps) == sum(lengths) - len(lengths) and max(steps) == 6
    # In batches of six that wait for their longest row it would take at least this many steps.
    ordered = sorted(lengths)
    assert len(steps) < sum(n - 1 for n in ordered[5::6])


def test_a_group_is_handed_out_before_others_are_finished() -> None:
    model = student("llama")
    asked = requests([5, 6], max_new_tokens=20)
    quick, slow = (generate(model, r.prompt_ids, (), 20) for r in asked)
    stop = next(t for t in quick if t not in slow)
    with watched(model) as calls:
        stream = sampler(model, stop=(stop,)).sample(asked)
        assert next(stream).request.group_id == 50
        assert len(calls) == quick.index(stop) + 1 < 20
        assert [g.request.group_id for g in stream] == [51]


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_greedy_does_not_depend_on_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(name)
    asked = requests(LENGTHS, max_new_tokens=40)
    stop = stops_at_several_times([generate(model, r.prompt_ids, (), 40) for r in asked])
    whole = list(sampler(model, stop=stop).sample(asked))
    for rows in (1, 2, 4):
        assert close(list(sampler(model, stop=stop, rows_per_batch=rows).sample(asked)), whole)
    assert close(list(sampler(model, stop=stop).sample(asked[::-1])), whole)
    assert close([g for r in asked for g in sampler(model, stop=stop).sample([r])], whole)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 20)
    assert close(list(sampler(model, stop=stop).sample(asked)), whole)


def test_draws_do_not_depend_on_the_batch() -> None:
    """On these seeds no draw falls within rounding of a border; the same numbers decide the same tokens."""
    model = student("gemma3")
    asked = requests(LENGTHS, group_size=4, max_new_tokens=12, temperature=1.0)
    whole = list(sampler(model).sample(asked))
    for rows in (1, 3, 7):
        assert close(list(sampler(model, rows_per_batch=rows).sample(asked)), whole)
    assert close(list(sampler(model).sample(asked[::-1])), whole)
    assert close([g for r in asked for g in sampler(model).sample([r])], whole)
    smaller = [replace(r, settings=replace(r.settings, group_size=2, max_new_tokens=5)) for r in asked]
    cut = {i: [row[:5] for row in rows[:2]] for i, rows in ids(whole).items()}
    assert ids(list(sampler(model).sample(smaller))) == cut


def test_the_same_seeds_give_the_same_bits_and_others_do_not() -> None:
    model = student("qwen3")
    asked = requests(LENGTHS, group_size=3, max_new_tokens=12, temperature=1.0)
    torch.manual_seed(1)
    first = list(sampler(model).sample(asked))
    torch.manual_seed(2)
    again = list(sampler(model).sample(asked))
    assert ids(first) == ids(again)
    for i, rows in by_group(first).items():
        for a, b in zip(rows, by_group(again)[i], strict=True):
            assert torch.equal(a.behaviour_logprobs, b.behaviour_logprobs)
    for shift in (1000, 2**32, 2**40):
        moved = ids(list(sampler(model).sample([replace(r, seed=r.seed + shift) for r in asked])))
        assert all(moved[i] != rows for i, rows in ids(first).items())


def test_copies_of_a_prompt_are_groups_of_their_own() -> None:
    model = student("qwen3")
    (one,) = requests([8], group_size=4, max_new_tokens=12, temperature=1.0)
    copies = [one, replace(one, group_id=51, seed=one.seed + 1, row={"number": 1}), replace(one, group_id=52)]
    groups = list(sampler(model).sample(copies))
    found = ids(groups)
    assert found[50] != found[51] and found[50] == found[52]
    assert len({tuple(row) for row in found[50]}) == 4
    assert {g.request.group_id: g.request.row["number"] for g in groups} == {50: 0, 51: 1, 52: 0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_new_token(temperature: float) -> None:
    model = student("llama")
    asked = requests(LENGTHS, group_size=2, max_new_tokens=1, temperature=temperature)
    with watched(model) as calls:
        groups = list(sampler(model, rows_per_batch=4).sample(asked))
    assert all(rollout.completion_ids.shape == (1,) for g in groups for rollout in g.rollouts)
    assert sum(real for _, _, real in calls) == sum(LENGTHS), "only prompts go through the model"
    if temperature == 0:
        assert ids(groups) == {r.group_id: [generate(model, r.prompt_ids, (), 1)] * 2 for r in asked}


def test_no_requests() -> None:
    assert list(sampler(student("llama")).sample([])) == []


def test_the_end_token_is_kept_with_its_logprob() -> None:
    model = student("qwen3")
    (request,) = requests([7], max_new_tokens=12)
    free = generate(model, request.prompt_ids, (), 12)
    end = next(t for t in free[3:] if t not in free[:3])
    assert 40 not in free
    ((rollout,),) = (g.rollouts for g in sampler(model, stop=(40, end)).sample([request]))
    assert rollout.completion_ids.tolist() == free[: free.index(end) + 1]
    assert rollout.finish_reason == "stop" and rollout.loss_mask.all()
    assert len(rollout.behaviour_logprobs) == len(rollout.completion_ids)
    assert rollout.text == "".join(chr(31 + t) for t in free[: free.index(end)])
    ((whole,),) = (g.rollouts for g in sampler(model, stop=()).sample([request]))
    assert whole.finish_reason == "length" and whole.text == "".join(chr(31 + t) for t in free if t > 1)


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_the_student_is_as_it_was_whenever_a_group_comes_out() -> None:
    model = student("qwen3")
    model.model.layers[0].mlp.eval()
    before, config = modes(model), (model.config.to_dict(), model.generation_config.to_dict())
    seen: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, torch.is_grad_enabled())))
    random = torch.get_rng_state()
    count = 0
    for group in sampler(model, stop=(7, 11)).sample(requests(LENGTHS, group_size=3, temperature=1.0)):
        count += 1
        assert modes(model) == before and torch.is_grad_enabled()
        assert not any(r.behaviour_logprobs.requires_grad or r.completion_ids.is_inference() for r in group.rollouts)
    assert count == len(LENGTHS) and set(seen) == {(False, False)}
    assert modes(model) == before and torch.is_grad_enabled()
    assert (model.config.to_dict(), model.generation_config.to_dict()) == config
    assert torch.equal(torch.get_rng_state(), random)


def test_the_student_is_as_it_was_after_an_error_or_a_stop() -> None:
    model = student("qwen3")
    before = modes(model)
    stream = sampler(model, stop=(7, 11)).sample(requests(LENGTHS, group_size=3, temperature=1.0))
    next(stream)
    stream.close()
    assert modes(model) == before and torch.is_grad_enabled()

    def fail(module: nn.Module, args: object) -> None:
        raise ValueError("broken")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        list(sampler(model).sample(requests(LENGTHS)))
    handle.remove()
    assert modes(model) == before and torch.is_grad_enabled()


def test_dropout_is_off_while_sampling() -> None:
    model = student("llama", attention_dropout=0.5)
    asked = requests(LENGTHS)
    assert ids(list(sampler(model).sample(asked))) == {
        r.group_id: [generate(model, r.prompt_ids, (1,), 12)] for r in asked
    }


def test_gradient_checkpointing_neither_stops_the_cache_nor_is_switched_off() -> None:
    plain, model = student("qwen3"), student("qwen3")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    asked = requests(LENGTHS, group_size=2, temperature=1.0)
    with watched(model) as calls:
        groups = list(sampler(model).sample(asked))
    assert all(new == 1 for _, new, _ in calls[1:])
    assert ids(groups) == ids(list(sampler(plain).sample(asked)))
    assert all(layer.gradient_checkpointing and layer.training for layer in model.model.layers)


def test_autocast_copies_of_the_weights_do_not_outlive_the_sampling() -> None:
    """Sampling, an update and sampling again inside one autocast, as in a training step."""
    model = student("llama")
    asked = requests([6], group_size=2, max_new_tokens=6, temperature=1.0)
    drawn = sampler(model)

    def logprobs() -> torch.Tensor:
        (group,) = drawn.sample(asked)
        return torch.cat([r.behaviour_logprobs for r in group.rollouts])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = logprobs()
        loss = model(torch.tensor([[3, 4, 5]]), use_cache=False).logits.float().square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.lm_head.parameters())
        assert all(p.grad is not None for p in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        second = logprobs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = logprobs()
    assert first.dtype == torch.float32 and not torch.equal(first, second)
    assert torch.equal(second, fresh)


def test_the_current_weights_are_the_ones_that_sample() -> None:
    model = student("llama")
    drawn, asked = sampler(model), requests(LENGTHS)
    before = ids(list(drawn.sample(asked)))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))
    after = ids(list(drawn.sample(asked)))
    assert after != before
    assert after == {r.group_id: [generate(model, r.prompt_ids, (1,), 12)] for r in asked}
    assert drawn.same_engine


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("rows_per_batch", [5, 256])
@pytest.mark.parametrize("off", [("drop_finished",), ("prefill_once",), ("drop_finished", "prefill_once")])
def test_switched_off_optimisations_draw_the_same(name: str, rows_per_batch: int, off: tuple[str, ...]) -> None:
    model = student(name)
    asked = requests(LENGTHS, group_size=4, max_new_tokens=15, temperature=1.0)
    on = list(sampler(model, stop=(7, 11, 20), rows_per_batch=rows_per_batch).sample(asked))
    assert len({len(r.completion_ids) for g in on for r in g.rollouts}) > 5
    assert close(on, list(sampler(model, stop=(7, 11, 20), rows_per_batch=rows_per_batch, off=off).sample(asked)))


def test_a_finished_row_that_is_kept_goes_through_the_model_to_the_end() -> None:
    model = student("qwen3")
    asked = requests([5, 5], group_size=3, max_new_tokens=15, temperature=1.0)
    with watched(model) as calls:
        groups = list(sampler(model, stop=(7, 11, 20), off=["drop_finished"]).sample(asked))
    longest = max(len(r.completion_ids) for g in groups for r in g.rollouts)
    assert [rows for rows, new, _ in calls if new == 1] == [6] * (longest - 1)


def test_without_prefill_once_a_prompt_goes_through_for_every_rollout() -> None:
    model = student("qwen3")
    asked = requests([6, 6], group_size=4, max_new_tokens=3, temperature=1.0)
    with watched(model) as calls:
        list(sampler(model, off=["prefill_once"]).sample(asked))
    assert calls[0] == (8, 6, 48)
