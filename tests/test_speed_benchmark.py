"""The comparison with TRL: its cases are what they say, its table is arithmetic, and our side of it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import limit
import pytest
import run
import step
import torch
from cases import CASES, CHARACTERS, Case, Shape, model, prompts, reward, tokenizer
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
    plain = {"side": "distillkit", "case": "fixed", "method": "grpo", "settings": {}, "seconds": [1.0, 2.0, 9.0]}
    return {**plain, "rollouts": 64, "tokens": [100, 100], "moved": 5, "peak_bytes": 2**30, **given}


def test_the_table_takes_trls_faster_and_smaller_side() -> None:
    best = result(side="trl", settings={"mode": "best"}, seconds=[5.0], peak_bytes=4 * 2**30)
    default = result(side="trl", settings={"mode": "default"}, seconds=[8.0], peak_bytes=2 * 2**30)
    distil = [replaced(r, method="distil") for r in (result(), best, default)]
    table = run.table([result(), best, default, *distil, result(method="kdrl")])
    assert table.splitlines()[2:] == [
        "| fixed | grpo | 2.00 | 5.00 | 2.50 | 1.00 | 2.00 | 0.50 |",
        "| fixed | distil | 2.00 | 5.00 | 2.50 | 1.00 | 2.00 | 0.50 |",
        "| fixed | kdrl (TRL: grpo + distil) | 2.00 | 10.00 | 5.00 | 1.00 | 2.00 | 0.50 |",
    ]


def replaced(found: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {**found, **given}


@pytest.mark.parametrize("other", [{"rollouts": 32}, {"moved": 4}, {"tokens": [120, 120]}])
def test_sides_that_did_other_work_are_refused(other: dict[str, Any]) -> None:
    run.check_same_work([result(), result(side="trl", tokens=[109, 109])])
    with pytest.raises(SystemExit, match="fixed, grpo: not the same work"):
        run.check_same_work([result(), result(side="trl", **other)])


@pytest.mark.parametrize("method", step.METHODS)
def test_our_side_runs(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # Lightning leaves them set
        monkeypatch.setenv(name, "1")
    found = step.measure(TINY, method, steps=2, warm_up=1, settings={}, folder=tmp_path)
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
    case = replace(TINY, student=Shape(64, 1, 64), teacher=Shape(64, 1, 64), vocabulary=100)
    layer, n, g, p, c = 6 * 64 * 64, 6, 2, 5, 7
    one = 2 * layer * n * (p + c) + 4 * 64 * n * 78 + 2 * 64 * 100 * n * c
    drawn = 2 * layer * (g * p + n * (c - 1)) + 4 * 64 * (g * 15 + n * 63) + 2 * 64 * 100 * n * c
    assert limit.floor(case, "kdrl", c) == limit.Floor(rollout=drawn, teacher=one, update=3 * one)
    assert limit.floor(case, "grpo", c).teacher == 0
    assert limit.Floor(rollout=2.0, teacher=4.0, update=6.0).seconds(2.0)["step"] == 6.0


def test_the_mean_length_of_a_completion_is_that_of_its_lengths() -> None:
    case = replace(TINY, ends=True, vocabulary=4, new_tokens=3)
    assert limit.mean_completion(case) == pytest.approx(1 * 0.25 + 2 * 0.75 * 0.25 + 3 * 0.75**2)
    assert limit.mean_completion(TINY) == 7
