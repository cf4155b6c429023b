"""The training stream is a function of its cursor; evaluation sets are shared out without counting anything twice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch

from distillkit.data import DataSource, EvalBatch, EvalBatches, EvalSet, PreparedPrompt, PromptBatch, PromptStream
from distillkit.errors import ConfigError


def prompts(count: int) -> list[PreparedPrompt]:
    return [PreparedPrompt(prompt_ids=(i,), prompt=str(i), row={}, index=i) for i in range(count)]


def take(stream: PromptStream, steps: int) -> list[PromptBatch]:
    return list(islice(stream, steps))


def indices(batches: Sequence[PromptBatch]) -> list[int]:
    return [prompt.index for batch in batches for prompt in batch.prompts]


def stream(
    count: int = 7, *, step: int = 4, cursor: int = 0, rank: int = 0, world: int = 1, seed: int = 5
) -> PromptStream:
    return PromptStream(
        prompts(count), prompts_per_step=step, seed=seed, rank=rank, world_size=world, start_cursor=cursor
    )


@pytest.mark.parametrize(("count", "step"), [(7, 4), (7, 7), (8, 4), (3, 8), (1, 1), (5, 1)])
def test_every_epoch_holds_every_row_once_and_steps_cross_epochs(count: int, step: int) -> None:
    sequence = indices(take(stream(count, step=step), 5 * count))
    epochs = [sequence[start : start + count] for start in range(0, len(sequence), count)]
    assert len(epochs) >= 5
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sequence = indices(take(stream(50, step=50), 3))
    assert len({tuple(sequence[i : i + 50]) for i in (0, 50, 100)}) == 3
    assert indices(take(stream(50, step=50), 3)) == sequence
    assert indices(take(stream(50, step=50, seed=6), 3)) != sequence


def test_the_order_of_the_data_without_shuffling() -> None:
    steps = PromptStream(prompts(3), prompts_per_step=2, seed=0, shuffle=False)
    assert indices(take(steps, 3)) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("trained", range(12))
def test_any_cursor_continues_the_same_sequence(trained: int) -> None:
    # Seven prompts, four a step: among these cursors are one inside, one at the end of, and some past an epoch.
    whole = take(stream(), 20)
    cursor = whole[trained].next_cursor
    rest = take(stream(cursor=cursor), 20 - trained - 1)
    assert rest == whole[trained + 1 :]


@pytest.mark.parametrize("count", [4, 8])
def test_resume_at_the_epoch_boundary_goes_on(count: int) -> None:
    whole = take(stream(count), 6)
    boundary = count // 4
    assert whole[boundary].cursor == count
    assert take(stream(count, cursor=count), 6 - boundary) == whole[boundary:]


def test_a_batch_says_where_to_continue_however_many_were_fetched() -> None:
    fetched = take(stream(), 3)
    trained = fetched[0]
    assert (trained.cursor, trained.next_cursor) == (0, 4)
    assert take(stream(cursor=trained.next_cursor), 1) == fetched[1:2]


def test_iterating_again_begins_at_the_start_cursor() -> None:
    steps = stream()
    first = take(steps, 2)
    assert take(steps, 2) == first
    steps.start_cursor = first[0].next_cursor
    assert take(steps, 1) == first[1:]


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_the_ranks_together_are_one_rank(world: int) -> None:
    whole = take(stream(), 6)
    shares = [take(stream(rank=rank, world=world), 6) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert [p for share in shares for p in share[step].prompts] == list(batch.prompts)
        assert {share[step].next_cursor for share in shares} == {batch.next_cursor}
        names = [share[step].offset + i for share in shares for i in range(len(share[step]))]
        assert names == list(range(batch.cursor, batch.next_cursor))


def test_a_step_may_repeat_a_prompt_under_another_name() -> None:
    [batch] = take(stream(3, step=8), 1)
    assert len(batch) == 8 and len({batch.offset + i for i in range(8)}) == 8


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    take(stream(), 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_step_that_the_ranks_cannot_share() -> None:
    with pytest.raises(ConfigError) as caught:
        stream(step=10, world=4)
    assert str(caught.value) == (
        "data.prompts_per_step: cannot be shared equally by the ranks\n"
        "    got:      10 prompts, 4 ranks\n"
        "    expected: a multiple of 4\n"
        "    try:      8 or 12"
    )
    with pytest.raises(ConfigError) as caught:
        stream(step=2, world=4)
    assert str(caught.value).endswith("    try:      4")
    with pytest.raises(ConfigError) as caught:
        stream(0)
    assert str(caught.value) == "data.train: no prompts\n    got:      0\n    expected: at least one"


def evaluation(count: int, *, rank: int, world: int, size: int) -> list[EvalBatch]:
    eval_set = EvalSet(name="set", source=DataSource(path="set.jsonl"), problems_per_batch=size)
    loader = EvalBatches(prompts(count), eval_set, set_index=3, rank=rank, world_size=world)
    batches = list(loader)
    assert len(loader) == len(batches)
    return batches


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 16])
def test_every_problem_is_valid_once_and_ranks_keep_step(count: int, world: int, size: int) -> None:
    ranks = [evaluation(count, rank=rank, world=world, size=size) for rank in range(world)]
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    everything = [(i, v) for batches in ranks for b in batches for i, v in zip(b.problem_indices, b.valid, strict=True)]
    assert sorted(i for i, valid in everything if valid) == list(range(count))
    assert len(everything) == -(-count // world) * world
    for batches in ranks:
        mine = [i for batch in batches for i in batch.problem_indices]
        assert len(mine) == len(set(mine))


def test_five_problems_on_two_ranks() -> None:
    first, second = (evaluation(5, rank=rank, world=2, size=2) for rank in range(2))
    assert [(b.problem_indices, b.valid) for b in first] == [((0, 2), (True, True)), ((4,), (True,))]
    assert [(b.problem_indices, b.valid) for b in second] == [((1, 3), (True, True)), ((0,), (False,))]
    assert first[0].set_index == 3 and first[0].eval_set.name == "set"


SOURCE = DataSource(path="set.jsonl")


@pytest.mark.parametrize(
    ("eval_set", "message"),
    [
        (
            EvalSet(name="a/b", source=SOURCE),
            "data.val[0].name\n    got:      'a/b'\n    expected: letters, digits, _ and -",
        ),
        (EvalSet(name="a", source=SOURCE, k=0), "data.val[0].k\n    got:      0\n    expected: at least 1"),
        (
            EvalSet(name="a", source=SOURCE, k=4),
            "data.val[0].k\n    got:      4 equal greedy completions\n"
            "    try:      set data.val[0].temperature above 0, or data.val[0].k to 1",
        ),
        (
            EvalSet(name="a", source=SOURCE, k=4, temperature=1.0, ks=[1, 8]),
            "data.val[0].ks\n    got:      [1, 8]\n    expected: numbers from 1 to k = 4",
        ),
        (
            EvalSet(name="a", source=SOURCE, top_p=0.0),
            "data.val[0].top_p\n    got:      0.0\n    expected: 0 < top_p <= 1",
        ),
        (
            EvalSet(name="a", source=SOURCE, temperature=-1.0),
            "data.val[0].temperature\n    got:      -1.0\n    expected: at least 0",
        ),
        (
            EvalSet(name="a", source=SOURCE, max_new_tokens=0),
            "data.val[0].max_new_tokens\n    got:      0\n    expected: at least 1, or null",
        ),
        (
            EvalSet(name="a", source=SOURCE, problems_per_batch=0),
            "data.val[0].problems_per_batch\n    got:      0\n    expected: at least 1",
        ),
    ],
)
def test_evaluation_settings_that_cannot_work(eval_set: EvalSet, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        eval_set.check("data.val[0]")
    assert str(caught.value) == message


def test_the_ks_of_pass_at_k() -> None:
    assert EvalSet(name="a", source=SOURCE).pass_ks == (1,)
    assert EvalSet(name="a", source=SOURCE, k=8, temperature=1.0).pass_ks == (1, 8)
    assert EvalSet(name="a", source=SOURCE, k=8, temperature=1.0, ks=[4, 1, 4]).pass_ks == (1, 4)
