"""The comparison with TRL: its cases are what they say, its table is arithmetic, and our side of it runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import limit
import pytest
import run
import step
import torch
from cases import CASES, CHARACTERS, COMPARED, Case, Shape, model, prompts, reward, tokenizer
from measuring import Record, lines
from performance import tables
from torch.utils.flop_counter import FlopCounterMode

TINY = Case(
    name="tiny", student=Shape(64, 1, 64), teacher=Shape(64, 2, 64), groups=2, group_size=3, prompt_tokens=5,
    new_tokens=7,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_is_what_it_says(case: Case) -> None:
    texts = prompts(case, 2)
    own = tokenizer(len(CHARACTERS) + 2)
    assert {len(own(text)["input_ids"]) for text in texts} == {case.prompt_tokens}
    assert len(texts) == 2 * case.groups == len(set(texts))
    equal = [text for text in texts if len({reward(text, str(i)) for i in range(64)}) == 1]
    assert len(equal) == pytest.approx(2 * case.groups * case.equal_groups)


@pytest.mark.parametrize(("name", "student", "teacher"), [("fixed", 1, 6), ("tail", 6, 6), ("vocab", 42, 69)])
def test_the_models_are_as_large_as_they_are_said_to_be(name: str, student: int, teacher: int) -> None:
    case = CASES[name]
    for shape, millions in ((case.student, student), (case.teacher, teacher)):
        with torch.device("meta"):
            found = sum(p.numel() for p in model(replace(case, ends=True), shape, 0).parameters())
        assert round(found / 1e6) == millions


@pytest.mark.parametrize("ends", [False, True])
def test_a_model_ends_when_it_may_and_never_otherwise(ends: bool) -> None:
    logits = model(replace(TINY, ends=ends), TINY.student, 0)(torch.randint(2, 60, (4, 9))).logits
    end = logits.softmax(-1)[..., 1]
    assert bool(((end * TINY.vocabulary > 0.5) & (end * TINY.vocabulary < 2)).all() if ends else (end < 1e-20).all())


def result(**given: Any) -> dict[str, Any]:
    plain = {"side": "distillkit", "case": "fixed", "method": "grpo", "mode": "", "seconds": [1.0, 2.0, 9.0]}
    return {**plain, "rollouts": 64, "tokens": [100, 100], "moved": 5, "peak_bytes": 2**30, **given}


def test_the_table_takes_trls_faster_and_smaller_side() -> None:
    best = result(side="trl", mode="best", seconds=[4.5, 5.0, 8.0], peak_bytes=4 * 2**30)
    default = result(side="trl", mode="default", seconds=[8.0], peak_bytes=2 * 2**30)
    distil = [replaced(r, method="distil") for r in (result(), best, default)]
    tuned = result(method="distil", side="trl", mode="tuned", seconds=[4.0], peak_bytes=3 * 2**30, tokens=[120, 120])
    table = tables.speed([result(), best, default, *distil, tuned, result(method="kdrl", tokens=[90, 90])])
    ours = "2.00 (1.50 to 5.50)"
    times = f"{ours} | 5.00 (4.75 to 6.50) | **2.50** | 2.50"
    memory = "1.00 | 2.00 | 0.50"
    both = f"{ours} | 10.00 | **5.00** | 4.50 | 9.00 | 4.50"
    assert table.splitlines()[2:] == [
        f"| fixed | grpo (TRL best) | {times} | — | — | {memory} | 100, 100 |",
        f"| fixed | distil (TRL best) | {times} | 4.00 | 2.00 | {memory} | 100, 100 |",
        f"| fixed | kdrl (TRL: grpo + distil) | {both} | {memory} | 90, 100, 100 |",
    ]


def replaced(found: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {**found, **given}


def test_trl_is_tuned_only_where_something_was_found() -> None:
    assert set(run.TUNED) <= {(case, method) for case in COMPARED for method in run.PEERS}
    for case in COMPARED:
        every = list(run.turns(case, "python-of-trl", 5))
        found = [(turn.method, turn.mode) for turn in every]
        tuned = [(method, "tuned") for method in run.PEERS if (case, method) in run.TUNED]
        plain = [(method, mode) for method in run.PEERS for mode in ("default", "best")]
        assert sorted(found) == sorted([*[(method, "") for method in run.METHODS], *plain, *tuned])
        assert all(turn.command[0] == ("python-of-trl" if turn.mode else sys.executable) for turn in every)


@pytest.mark.parametrize("other", [{"rollouts": 32}, {"moved": 4}, {"tokens": [120, 120]}])
def test_sides_that_did_other_work_are_refused(other: dict[str, Any]) -> None:
    run.check_same_work([result(), result(side="trl", tokens=[109, 109])])
    with pytest.raises(SystemExit, match="fixed, grpo: not the same work"):
        run.check_same_work([result(), result(side="trl", **other)])


def test_where_completions_end_by_chance_their_tokens_may_differ_by_chance() -> None:
    """5 steps of 64 rollouts: a standard error of a completion's length is 5 % of it."""
    lengths = [(1 - 1 / 77) ** k for k in range(512)]
    mean = sum(lengths)
    spread = (sum((2 * k + 1) * p for k, p in enumerate(lengths)) - mean**2) ** 0.5 / mean
    assert limit.relative_spread(CASES["tail"]) == pytest.approx(spread) and 0.9 < spread < 1
    assert limit.relative_spread(CASES["fixed"]) == 0
    most = 4 * 2**0.5 * spread / 320**0.5
    ours = result(case="tail", tokens=[100] * 5)
    run.check_same_work([ours, result(case="tail", side="trl", tokens=[100 * (0.99 + most)] * 5)])
    with pytest.raises(SystemExit, match="tail, grpo: not the same work"):
        run.check_same_work([ours, result(case="tail", side="trl", tokens=[100 * (1.01 + most)] * 5)])


@pytest.mark.parametrize("method", step.METHODS)
def test_our_side_runs(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning leaves them set
        monkeypatch.setenv(name, "1")
    settings = {"sampler.rows_per_batch": 4, "teacher.tokens_per_batch": 30, "head_chunk": 3}
    found = step.measure(TINY, method, steps=2, warm_up=1, settings=settings, folder=tmp_path)
    assert len(found["seconds"]) == 2 and len(found["phases"]["update"]) == 2
    assert found["tokens"] == [TINY.rollouts * TINY.new_tokens] * 2
    assert found["moved"] == len(list(model(TINY, TINY.student, 0).parameters()))


def test_the_floor_counts_what_a_forward_does() -> None:
    """Against torch's own counter, on a whole forward with every head call: all but attention's upper triangle."""
    length, rows = 24, 3
    made = model(replace(TINY, ends=True), TINY.student, 0)
    made.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        made(torch.randint(2, 60, (rows, length)))
    square = rows * length**2
    flops = limit.forward(TINY.student, rows * length, square, rows * length, TINY.vocabulary)
    assert counter.get_total_flops() == pytest.approx(flops, rel=1e-3)


def test_the_floor_of_a_step_by_hand() -> None:
    """2 groups of 3, prompt 5, completion 7: the prompt once a group, all but the last token of a completion."""
    case = replace(TINY, student=Shape(64, 1, 64), teacher=Shape(64, 1, 64), vocabulary=100)
    layer = 6 * 64 * 64
    tokens = 2 * 5 + 6 * 6
    pairs = 2 * (1 + 2 + 3 + 4 + 5) + 6 * (6 + 7 + 8 + 9 + 10 + 11)
    heads = 2 * 1 + 6 * 6
    one = 2 * layer * tokens + 4 * 64 * pairs + 2 * 64 * 100 * heads
    assert limit.floor(case, "kdrl", 7) == limit.Floor(rollout=one, teacher=one, update=3 * one)
    assert limit.floor(case, "distil", 7) == limit.floor(case, "kdrl", 7)
    assert limit.Floor(rollout=2.0, teacher=4.0, update=6.0).seconds(2.0)["step"] == 6.0


@pytest.mark.parametrize("masked", [False, True])
def test_the_floor_leaves_out_rollouts_with_nothing_to_learn_from(masked: bool) -> None:
    """Against all the ways in which the rewards of 4 groups of 3 can fall, 2 of the groups all wrong."""
    case = replace(TINY, groups=4, group_size=3, equal_groups=0.5, masked=masked)
    ways = [
        [(0, 0, 0)] * 2 + [first, second] for first in product((0, 1), repeat=3) for second in product((0, 1), repeat=3)
    ]
    mixed = [[0 < sum(group) < 3 for group in groups] for groups in ways]
    wrong = [[group.count(0) if masked else 3 for group in groups] for groups in ways]

    def share(found: list[list[Any]], whole: int) -> float:
        return sum(sum(row) for row in found) / (len(ways) * whole)

    learns = share(mixed, 4)
    assert limit.learned(case, "grpo") == limit.Part(learns, learns)
    assert limit.floor(case, "grpo", 7).teacher == 0
    assert limit.floor(case, "grpo", 7).update == pytest.approx(learns * limit.floor(case, "distil", 7).update)
    either = share([[m or w > 0 for m, w in zip(*row, strict=True)] for row in zip(mixed, wrong, strict=True)], 4)
    assert limit.learned(case, "kdrl") == limit.Part(either, either)
    assert limit.taught(case, "kdrl") == limit.Part(share([[w > 0 for w in row] for row in wrong], 4), share(wrong, 12))


def test_the_mean_length_of_a_completion_is_that_of_its_lengths() -> None:
    case = replace(TINY, ends=True, vocabulary=4, new_tokens=3)
    assert limit.mean_completion(case) == pytest.approx(1 * 0.25 + 2 * 0.75 * 0.25 + 3 * 0.75**2)
    assert limit.mean_completion(TINY) == 7


def test_the_inputs_last_for_every_step(tmp_path: Path) -> None:
    count = (
        "import json, pathlib, sys; text = pathlib.Path(sys.argv[-1], 'prompts.jsonl').read_text(); "
        "print(json.dumps({'lines': len(text.splitlines())}))"
    )
    turn = run.Turn("tiny", "grpo", "distillkit", "", 30, (sys.executable, "-c", count))
    record = Record(tmp_path / "speed.jsonl", ("case",), resume=False)
    run.go([turn], 1, 1, record)
    assert lines(record.path)[0]["lines"] == (2 + 30) * CASES["tiny"].groups


def test_a_batch_divides_the_rollouts() -> None:
    assert [CASES[name].batch(8) for name in ("tiny", "tail", "sparse")] == [6, 8, 6]
    assert CASES["sparse"].batch(60) == CASES["sparse"].batch(64) == 60


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "distil"])
def test_trls_trainer_runs_and_does_the_same_work(method: str, tmp_path: Path) -> None:
    turns = [t for t in run.turns("tiny", sys.executable, 1, ("default",)) if t.method == method]
    record = Record(tmp_path / "speed.jsonl", ("case", "method", "side", "mode", "round"), resume=False)
    run.go(turns, 1, 1, record)
    found = lines(record.path)
    assert [line["side"] for line in found] == ["distillkit", "trl"]
    assert found[1]["versions"]["trl"].startswith("1.")
    assert all(line["moved"] > 0 and len(line["seconds"]) == 1 for line in found)
    run.check_same_work(found)
