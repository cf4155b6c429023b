"""Problems are answered with the set's own settings, judged, and recorded one line each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distillkit.components import RewardFn
from distillkit.data import EvalBatches
from distillkit.errors import ContractError, DataError
from distillkit.evaluation import ProblemResult, evaluate_batch, gather_results, read_results, write_results
from distillkit.types import RewardOutput, RolloutBatch
from tests.evaluation.fake_parts import DigitReward, DigitSampler, eval_set, problems, student_info


class NamedFormat(RewardFn):
    """A reward named `format`: right below three characters; not applicable to four."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        return RewardOutput.single("format", [None if len(t) > 3 else float(len(t) < 3) for t in rollouts.texts])


def answer(
    count: int = 5, *, rewards: list[RewardFn] | None = None, seed: int = 3, **settings: Any
) -> list[ProblemResult]:
    sampler = DigitSampler(group_size=8, max_new_tokens=64)
    judges = [DigitReward()] if rewards is None else rewards
    return [
        result
        for batch in EvalBatches(problems(count), eval_set(**settings))
        for result in evaluate_batch(batch, sampler=sampler, rewards=judges, student_info=student_info(), seed=seed)
    ]


def test_requests_carry_the_sets_own_settings() -> None:
    sampler = DigitSampler(group_size=8, max_new_tokens=64, temperature=0.7)
    [batch] = EvalBatches(problems(2), eval_set(top_p=0.9))
    evaluate_batch(batch, sampler=sampler, rewards=[], student_info=student_info(), seed=3, policy_version=11)
    first, second = sampler.asked
    assert (first.settings.group_size, first.settings.temperature, first.settings.top_p) == (4, 1.0, 0.9)
    assert first.settings.max_new_tokens == 64 and first.policy_version == 11
    assert (first.prompt_ids, first.prompt, first.row, first.group_id) == (
        (0, 7),
        "0?",
        {"prompt": "0?", "answer": "0"},
        0,
    )
    assert first.seed != second.seed
    [batch] = EvalBatches(problems(2), eval_set(max_new_tokens=5))
    evaluate_batch(batch, sampler=sampler, rewards=[], student_info=student_info(), seed=3)
    assert sampler.asked[2].settings.max_new_tokens == 5
    assert sampler.asked[2].seed == first.seed


def test_results_are_in_the_order_of_the_batch_with_their_own_completions() -> None:
    results = answer()
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    for result in results:
        assert result.gold == str(result.index % 2) and result.prompt == f"{result.index}?"
        assert len(result.completions) == 4
        for completion in result.completions:
            digit = completion.text[-1]
            assert completion.length == len(completion.text)
            assert completion.truncated == (len(completion.text) > 3)
            assert completion.correct == (None if digit == "3" else digit == result.gold)
            assert completion.answer == (digit if digit in "01" else None)
            assert completion.format_ok == {"3": None, "2": False}.get(digit, True)
            assert completion.rewards == {"digit": None if digit == "3" else float(digit == result.gold)}
            assert completion.status["digit"] == {"3": "timed_out", "2": "unparseable"}.get(digit, "scored")
    assert {c.text[-1] for result in results for c in result.completions} == set("0123")


def test_draws_depend_on_seed_set_and_problem_not_on_the_batch() -> None:
    assert answer(problems_per_batch=1) == answer(problems_per_batch=16) == answer()
    assert answer(seed=4) != answer()
    texts = [[c.text for c in result.completions] for result in answer(name="other")]
    assert texts != [[c.text for c in result.completions] for result in answer()]


def test_a_reward_named_format_decides_the_format() -> None:
    for result in answer(rewards=[DigitReward(), NamedFormat()]):
        for completion in result.completions:
            assert completion.format_ok == {2: True, 3: False, 4: None}[len(completion.text)]


def test_without_rewards_nothing_is_known() -> None:
    for result in answer(rewards=[]):
        assert all((c.correct, c.answer, c.format_ok) == (None, None, None) for c in result.completions)


def test_another_column_as_gold() -> None:
    assert [result.gold for result in answer(2, gold="prompt")] == ["0?", "1?"]
    assert [result.gold for result in answer(2, gold="none")] == [None, None]


def test_a_sampler_that_loses_a_group_is_named() -> None:
    class Forgetful(DigitSampler):
        def sample(self, requests: Any) -> Any:
            yield from super().sample(requests[:1])

    [batch] = EvalBatches(problems(2), eval_set())
    with pytest.raises(ContractError) as caught:
        evaluate_batch(batch, sampler=Forgetful(), rewards=[], student_info=student_info(), seed=3)
    assert str(caught.value) == (
        "model.sampler: other groups than were asked for\n"
        "    got:      groups [0] of [4] rollouts\n"
        "    expected: groups [0, 1] of 4 rollouts"
    )


def test_file_schema(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "five.jsonl"
    write_results(path, answer(2), step=7)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(row) for row in rows] == [
        ["schema_version", "step", "set", "index", "prompt", "gold", "completions"]
    ] * 2
    row = rows[1]
    assert (row["schema_version"], row["step"], row["set"], row["index"]) == (1, 7, "five", 1)
    assert (row["prompt"], row["gold"]) == ("1?", "1")
    assert list(row["completions"][0]) == [
        "text",
        "correct",
        "answer",
        "truncated",
        "length",
        "format_ok",
        "rewards",
        "status",
    ]
    assert [(7, result) for result in answer(2)] == list(read_results(path))


def test_no_step_is_lost_or_doubled(tmp_path: Path) -> None:
    path = tmp_path / "five.jsonl"
    for step in (0, 5, 10):
        write_results(path, answer(seed=step), step=step)
    uninterrupted = path.read_bytes()
    # A run killed after step 10 goes on from a checkpoint of step 3: it writes 5 and 10 again.
    write_results(path, answer(seed=5), step=5)
    assert path.read_bytes() == uninterrupted
    write_results(path, answer(seed=10), step=10)
    assert path.read_bytes() == uninterrupted
    write_results(path, answer(seed=99), step=5)
    kept = list(read_results(path))
    assert [step for step, _ in kept] == [0] * 5 + [5] * 5 + [10] * 5
    assert [result for step, result in kept if step == 5] == answer(seed=99)
    assert [path.name for path in tmp_path.iterdir()] == ["five.jsonl"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "five.jsonl"
    write_results(path, answer(), step=0)
    before = path.read_bytes()

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(path, answer(seed=4), step=1)
    assert path.read_bytes() == before


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "five.jsonl"
    [result] = answer(1)
    write_results(path, [ProblemResult(**{**vars(result), "gold": math.nan})], step=0)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["gold"] == "nan"


def test_repeated_problems_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "five.jsonl"
    second = EvalBatches(problems(5), eval_set(), rank=1, world_size=2)
    results = [
        result
        for batch in second
        for result in evaluate_batch(
            batch, sampler=DigitSampler(), rewards=[DigitReward()], student_info=student_info(), seed=3
        )
    ]
    assert [(result.index, result.valid) for result in results] == [(1, True), (3, True), (0, False)]
    write_results(path, results, step=0)
    assert [result.index for _, result in read_results(path)] == [1, 3]
    assert [result.index for result in gather_results(results)] == [1, 3]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "five.jsonl"
    path.write_text('{"text": "mine"}\n')
    with pytest.raises(DataError) as caught:
        write_results(path, answer(1), step=0)
    assert str(caught.value) == (
        f"{path}: not a file of evaluation results\n"
        '    got:      a line that starts \'{"text": "mine"}\\n\'\n'
        "    try:      move it away"
    )
    assert path.read_text() == '{"text": "mine"}\n'
    path.write_text('{"schema_version": 2, "step": 0}\n')
    with pytest.raises(DataError) as caught:
        list(read_results(path))
    assert str(caught.value) == (f"{path}: evaluation results\n    got:      schema_version 2\n    expected: 1")
