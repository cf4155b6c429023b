"""`answer`, `format` and `length`: what they read, what they give, what they refuse."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from distillkit.embedded.arithmetic import check_chain, held_out
from distillkit.errors import ConfigError, DataError
from distillkit.rewards.answer import AnswerReward
from distillkit.rewards.format import FormatReward
from distillkit.rewards.length import LengthReward
from distillkit.types import CORRECT, UNKNOWN, WRONG
from tests.rewards.batches import batch


@pytest.mark.parametrize(
    ("arguments", "text", "answer"),
    [
        ({"after": ">"}, "3+8>1", "1"),
        ({"after": ">"}, "1", "1"),
        ({"after": ">"}, "3+8>", None),
        ({"after": "####"}, "9+9=18\n#### 18 ", "18"),
        ({"pattern": r"\d+"}, "1, 2 and 3", "3"),
        ({"pattern": r"= (\d+)"}, "x = 1, y = 2", "2"),
        ({"pattern": r"(?P<junk>\w) = (?P<answer>\d+)"}, "x = 1, y = 2", "2"),
        ({"pattern": r"a(b)?"}, "a", None),
        ({"pattern": r"\d+"}, "none", None),
        ({}, r"so \boxed{5}", "5"),
        ({}, r"so \boxed{5", None),
        ({}, "first\nlast one \n\n", "last one"),
        ({}, "  ", None),
    ],
)
def test_the_answer_is_where_the_arguments_say(arguments: dict[str, Any], text: str, answer: str | None) -> None:
    assert AnswerReward(**arguments).extract(text) == answer


def test_answers_are_compared_in_normal_form() -> None:
    cases = [
        ("1", "1", 1.0, "scored", CORRECT),
        ("2", "1", 0.0, "scored", WRONG),
        ("1.0", 1, 1.0, "scored", CORRECT),
        ("1,000", "1000", 1.0, "scored", CORRECT),
        (" Paris. ", "Paris", 1.0, "scored", CORRECT),
        ("paris", "Paris", 0.0, "scored", WRONG),
        ("", "1", 0.0, "unparseable", WRONG),
        ("1", None, math.nan, "not_applicable", UNKNOWN),
    ]
    rows = [{"answer": gold} for _, gold, *_ in cases]
    output = AnswerReward(weight=0.5)(batch([text for text, *_ in cases], rows))
    assert [repr(v) for v in output.values[:, 0].tolist()] == [repr(case[2]) for case in cases]
    assert output.status[0] == tuple(case[3] for case in cases)
    assert output.correct.tolist() == [case[4] for case in cases]
    assert output.answers == ("1", "2", "1", "1000", "Paris", "paris", None, "1")
    assert (output.names, output.weights) == (("answer",), (0.5,))


def test_exact_and_ignore_case_change_what_is_equal() -> None:
    rows = [{"answer": "8"}, {"answer": "8"}, {"answer": "Paris"}]
    texts = ["3+5>8", "3+5>08", "paris"]
    assert AnswerReward(after=">")(batch(texts, rows)).values[:, 0].tolist() == [1.0, 1.0, 0.0]
    assert AnswerReward(after=">", exact=True)(batch(texts, rows)).values[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert AnswerReward(after=">", ignore_case=True)(batch(texts, rows)).values[:, 0].tolist() == [1.0, 1.0, 1.0]


def test_chains_of_the_embedded_task_are_judged_as_the_task_judges_them() -> None:
    rows = held_out()[:200]
    texts = [row["chain"] if i % 2 else row["chain"][:-1] + str(i % 10) for i, row in enumerate(rows)]
    output = AnswerReward(after=">", exact=True)(batch(texts, rows))
    expected = [check_chain(row["prompt"], text).correct for row, text in zip(rows, texts, strict=True)]
    assert output.correct.tolist() == [int(right) for right in expected]
    assert 100 < sum(expected) < 130


def test_rows_without_a_reference_are_reported() -> None:
    rows = [{"answer": "1"}, {"answer": None}, {"answer": " "}, {"question": "?"}, {"answer": 0}]
    assert AnswerReward().check_rows(rows) == [
        (1, "None is not an answer"),
        (2, "' ' is not an answer"),
        (3, "no column 'answer'"),
    ]
    with pytest.raises(DataError, match="reward answer: the data has no column 'gold'"):
        AnswerReward(answer="gold")(batch(["1"], [{"answer": "1"}]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"after": ">", "pattern": "x"},
            "model.rewards: answer.after and answer.pattern\n    got:      after='>', pattern='x'\n"
            "    expected: after (a text that is not empty), pattern, or neither",
        ),
        (
            {"after": ""},
            "model.rewards: answer.after and answer.pattern\n    got:      after='', pattern=None\n"
            "    expected: after (a text that is not empty), pattern, or neither",
        ),
        (
            {"pattern": "("},
            "model.rewards: answer.pattern\n    got:      '(': missing ), unterminated subpattern at position 0\n"
            "    expected: a regular expression",
        ),
    ],
)
def test_answer_refuses_what_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AnswerReward(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>2+2</think>4", 1.0),
        ("<think>\n2+2\n</think>\n\n4\n", 1.0),
        ("\n<think></think> 4", 1.0),
        ("<think>2+2</think>", 0.0),
        ("<think>2+2</think> \n ", 0.0),
        ("4", 0.0),
        ("So: <think>2+2</think> 4", 0.0),
        ("<think>2+2 4", 0.0),
        ("<think>a</think> b <think>c</think> d", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think>b</think>c", 0.0),
    ],
)
def test_the_default_format_is_one_thought_and_then_an_answer(text: str, value: float) -> None:
    output = FormatReward()(batch([text], [{}]))
    assert output.values.tolist() == [[value]]
    assert (output.status, output.correct.tolist()) == ((("scored",),), [UNKNOWN])


def test_a_format_of_ones_own_must_match_from_end_to_end() -> None:
    reward = FormatReward(pattern=r"\d+(>\d+)*", weight=0.1)
    assert [reward.matches(text) for text in ("3>1", "3>1>", " 3", "3\n")] == [True, False, False, False]
    with pytest.raises(ConfigError) as caught:
        FormatReward(pattern="[")
    assert str(caught.value) == (
        "model.rewards: format.pattern\n    got:      '[': unterminated character set at position 0\n"
        "    expected: a regular expression"
    )


@pytest.mark.parametrize("text", ["<think>" + " " * 200_000, "<think></think>" + " " * 200_000, "<think>" * 30_000])
def test_the_default_format_is_checked_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    assert not FormatReward().matches(text)
    assert time.perf_counter() - start < 2.0


def test_length_is_punished_as_dapo_does() -> None:
    """Eq. 13 with the paper's 20,480 and 4,096, by hand: one half is reached in the middle of the buffer."""
    reward = LengthReward(max_length=20_480, buffer=4_096)
    lengths = (0, 16_384, 16_385, 18_432, 20_479, 20_480, 20_481, 100_000)
    expected = (0.0, 0.0, -1 / 4096, -0.5, -4095 / 4096, -1.0, -1.0, -1.0)
    assert tuple(reward.value(length) for length in lengths) == expected


def test_length_counts_the_completions_tokens_against_the_samplers_limit() -> None:
    ids = [[5] * n for n in (8, 9, 10)]
    output = LengthReward(weight=0.5)(batch(["a", "b", "c"], [{}] * 3, completion_ids=ids, max_new_tokens=10))
    assert output.values[:, 0].tolist() == [0.0, -0.5, -1.0], "by default the buffer is a fifth of the limit: 2 tokens"
    assert output.correct.tolist() == [UNKNOWN] * 3 and output.weights == (0.5,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "model.rewards: length.max_length\n    got:      0\n    expected: at least 1 token"),
        ({"buffer": 0}, "model.rewards: length.buffer\n    got:      0\n    expected: 1 to max_length (None) tokens"),
        (
            {"max_length": 10, "buffer": 11},
            "model.rewards: length.buffer\n    got:      11\n    expected: 1 to max_length (10) tokens",
        ),
    ],
)
def test_length_refuses_what_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LengthReward(**arguments)
    assert str(caught.value) == message
