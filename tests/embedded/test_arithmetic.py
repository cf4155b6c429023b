"""The arithmetic task against Python's own arithmetic, and the splits against each other."""

from __future__ import annotations

import hashlib
import itertools
import json
import random

import pytest

from distillkit.embedded import DATASETS, MODELS, TRAIN_ROWS, resolve, rows
from distillkit.embedded.arithmetic import (
    HELD_OUT_COUNTS,
    VALIDATION_COUNTS,
    Row,
    check_chain,
    evaluate,
    generate,
    held_out,
    legal_steps,
    sample_chain,
    split_of,
    step_probabilities,
    validation,
)
from distillkit.errors import ConfigError, DataError


def oracle(expression: str) -> int:
    return eval(expression) % 10


def reachable(expression: str) -> set[str]:
    found = {expression}
    for at in range(0, len(expression) - 2, 2):
        found |= reachable(f"{expression[:at]}{oracle(expression[at : at + 3])}{expression[at + 3 :]}")
    return found


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return generate("train", 6000, seed=7)


def test_no_expression_is_in_two_splits(train: list[Row]) -> None:
    seen = {
        "train": {row["prompt"] for row in train},
        "validation": {row["prompt"] for row in validation() + generate("validation", 2000, seed=3)},
        "held_out": {row["prompt"] for row in held_out() + generate("held_out", 2000, seed=4)},
    }
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


def test_training_never_writes_a_problem_of_another_split(train: list[Row]) -> None:
    for row in train[:800]:
        for expression in reachable(row["prompt"][:-1]):
            assert split_of(expression) == "train"


def test_reference_chains_are_legal_and_end_in_the_value(train: list[Row]) -> None:
    for row in train + validation() + held_out():
        expression = row["prompt"][:-1]
        check = check_chain(row["prompt"], row["chain"])
        assert check.legal and check.correct
        assert check.answer == row["answer"] == str(oracle(expression))
        assert len(check.steps) == row["operands"] - 1
        assert all(oracle(step.expression) == oracle(expression) for step in check.steps)
        assert all(oracle(step.question) == int(step.value) for step in check.steps)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_step_is_legal_exactly_when_no_digits_make_it_wrong(size: int) -> None:
    samples = [tuple(random.Random(seed).choices("0123456789", k=size)) for seed in range(60)]
    for operators in itertools.product("+-*", repeat=size - 1):
        texts = ["".join(itertools.chain(*zip(digits, (*operators, ""), strict=True))) for digits in samples]
        always_right = {
            index
            for index in range(size - 1)
            if all(
                oracle(f"{text[: 2 * index]}{oracle(text[2 * index : 2 * index + 3])}{text[2 * index + 3 :]}")
                == oracle(text)
                for text in texts
            )
        }
        assert {step.index for step in legal_steps(texts[0])} == always_right


def test_chains_really_choose(train: list[Row]) -> None:
    by_size = {
        size: [len(legal_steps(row["prompt"][:-1])) > 1 for row in train if row["operands"] == size]
        for size in (3, 4, 5)
    }
    shares = {size: sum(choices) / len(choices) for size, choices in by_size.items()}
    assert shares[3] > 0.25 and shares[4] > 0.6 and shares[5] > 0.8


def test_the_first_step_is_drawn_with_the_documented_probabilities() -> None:
    rng = random.Random(0)
    firsts = [sample_chain("3*2+4*5", rng).split(">")[0] for _ in range(3000)]
    assert firsts.count("6+4*5") / 3000 == pytest.approx(step_probabilities(2)[0], abs=0.03)
    assert set(firsts) == {"6+4*5", "3*2+0"}
    assert sum(step_probabilities(4)) == pytest.approx(1.0)


def test_rows_are_the_same_everywhere() -> None:
    assert generate("train", 50, seed=5) == generate("train", 50, seed=5)
    assert generate("train", 50, seed=5) != generate("train", 50, seed=6)
    digests = [hashlib.sha256(json.dumps(part()).encode()).hexdigest()[:16] for part in (held_out, validation)]
    assert digests == ["f6efcb61585d0dcb", "204b278fb409de02"]


def test_the_fixed_sets_have_their_sizes_and_no_repeats() -> None:
    for part, counts in ((held_out(), HELD_OUT_COUNTS), (validation(), VALIDATION_COUNTS)):
        assert len({row["prompt"] for row in part}) == len(part) == sum(counts.values())
        assert {size: sum(row["operands"] == size for row in part) for size in counts} == dict(counts)


def test_a_caller_cannot_spoil_the_fixed_set() -> None:
    held_out()[0]["answer"] = "spoiled"
    assert held_out()[0]["answer"] != "spoiled"


@pytest.mark.parametrize(
    ("completion", "answer", "correct", "legal", "steps"),
    [
        ("3*2+0>6+0>6", "6", True, True, [("4*5", "0", True), ("3*2", "6", True), ("6+0", "6", True)]),
        ("3*6*5>8*5>0", "0", False, False, [("2+4", "6", False), ("3*6", "8", True), ("8*5", "0", True)]),
        ("6+4*5>6+1>6", "6", True, False, [("3*2", "6", True), ("4*5", "1", False), ("6+1", "6", False)]),
        ("6", "6", True, False, [("", "", False)]),
        ("6+4*5>", None, False, False, [("3*2", "6", True), ("", "", False)]),
        ("", None, False, False, [("", "", False)]),
        ("say 6", None, False, False, [("", "", False)]),
    ],
)
def test_a_completion_is_taken_apart(
    completion: str, answer: str | None, correct: bool, legal: bool, steps: list[tuple[str, str, bool]]
) -> None:
    check = check_chain("3*2+4*5>", completion)
    assert (check.answer, check.correct, check.legal) == (answer, correct, legal)
    assert [(step.question, step.value, step.legal) for step in check.steps] == steps


def test_an_ambiguous_step_is_read_as_the_legal_one() -> None:
    [step, *_] = check_chain("4-0-4", "4-4>0").steps
    assert (step.index, step.legal) == (0, True)


def test_any_legal_chain_is_correct() -> None:
    rng = random.Random(1)
    for row in held_out()[:100]:
        assert check_chain(row["prompt"], sample_chain(row["prompt"][:-1], rng)).correct


@pytest.mark.parametrize("text", ["", "3+", "3 + 4", "12+3", "3/4", "(3+4)", "٣+4"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not an expression"):
        evaluate(text)


@pytest.mark.parametrize("call", [("test", {3: 1.0}), ("held_out", {2: 1.0}), ("train", {6: 1.0}), ("train", {})])
def test_problems_that_no_split_has_are_refused(call: tuple[str, dict[int, float]]) -> None:
    split, operands = call
    with pytest.raises(ConfigError, match="arithmetic"):
        generate(split, 1, operands=operands)  # type: ignore[arg-type]


def test_names_lead_to_folders_and_rows() -> None:
    assert all((resolve(name) == folder) for name, folder in MODELS.items())
    assert resolve("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert {name: len(rows(name)) for name in DATASETS if "decompositions" not in name} == {
        "embedded:arithmetic/train": TRAIN_ROWS,
        "embedded:arithmetic/careless": TRAIN_ROWS,
        "embedded:arithmetic/validation": 300,
        "embedded:arithmetic/held_out": 500,
    }
    with pytest.raises(ConfigError, match="embedded:teacher"):
        resolve("embedded:teacherr")
    with pytest.raises(ConfigError, match="embedded:arithmetic/held_out"):
        rows("embedded:arithmetic/test")
