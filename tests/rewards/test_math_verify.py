"""`math_verify`: right and wrong answers on real problem sets, equivalences, hostile text, what is counted apart."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from math_verify import verify

from distillkit.errors import ConfigError, DataError
from distillkit.rewards.extract import gold_answer
from distillkit.rewards.math_answers import _expressions
from distillkit.rewards.math_verify import MathVerify
from distillkit.types import CORRECT, UNKNOWN, WRONG, RewardOutput
from tests.rewards.batches import batch, problems

SETS = ["gsm8k/test.jsonl", "math/math500.jsonl", "aime/aime24.jsonl", "aime/aime_2021_2024.jsonl", "amc/amc23.jsonl"]


@pytest.fixture(scope="module")
def reward() -> Iterator[MathVerify]:
    reward = MathVerify(workers=2, timeout_s=20.0)
    reward.setup()
    yield reward
    reward.teardown()


def score(reward: MathVerify, texts: list[str], golds: list[Any]) -> RewardOutput:
    return reward(batch(texts, [{"answer": gold} for gold in golds]))


def written(row: dict[str, Any]) -> str:
    """The answer of a row as its data set writes it, without this package's reading of it."""
    answer = str(row["answer"])
    return answer.split("####")[-1].strip() if "####" in answer else answer


def value(text: str) -> Fraction | None:
    """An independent reading of what is plainly a number or a simple fraction."""
    text = re.sub(r"[\s$]|\\[!,$]|^x=|^x\\in", "", text).replace("\\dfrac", "\\frac")
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    fraction = re.fullmatch(r"(-?)\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", text)
    if fraction:
        sign, a, b, c, d = fraction.groups()
        return Fraction(int(a or b), int(c or d)) * (-1 if sign else 1)
    return Fraction(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else None


def plainly_equal(one: str, other: str) -> bool:
    numbers = value(one), value(other)
    return "".join(one.split()) == "".join(other.split()) or (numbers[0] is not None and numbers[0] == numbers[1])


@pytest.mark.parametrize("name", SETS)
def test_every_gold_answer_in_a_box_scores_one(reward: MathVerify, name: str) -> None:
    rows = problems(name)
    assert len(rows) == {"gsm8k": 1319, "math": 500, "amc": 40}.get(name.split("/")[0], len(rows))
    texts = [rf"We find that the answer is $\boxed{{{written(row)}}}$, as asked." for row in rows]
    output = reward(batch(texts, rows))
    assert [i for i, score in enumerate(output.values[:, 0].tolist()) if score != 1.0] == []
    assert (output.correct == CORRECT).all() and set(output.status[0]) == {"scored"}
    assert reward.check_rows(rows) == []


def test_every_math_answer_equals_itself_as_mathematics_too() -> None:
    """Equal texts are settled without the library: here each answer is parsed twice and compared by it."""
    for answer in (row["answer"] for row in problems("math/math500.jsonl")):
        gold, again = _expressions(answer), _expressions(answer + " ")
        assert gold and again and verify(list(gold), list(again), timeout_seconds=0), answer


@pytest.mark.parametrize("name", SETS)
def test_the_next_rows_answer_scores_zero_unless_the_two_are_equal(reward: MathVerify, name: str) -> None:
    rows = problems(name)
    other = [written(rows[(i + 1) % len(rows)]) for i in range(len(rows))]
    texts = [rf"We find that the answer is $\boxed{{{answer}}}$, as asked." for answer in other]
    values = reward(batch(texts, rows)).values[:, 0].tolist()
    equal = [plainly_equal(written(row), answer) for row, answer in zip(rows, other, strict=True)]
    assert values == [float(same) for same in equal]
    assert values.count(0.0) > 0.9 * len(rows)


def test_a_solution_column_serves_as_reference(reward: MathVerify) -> None:
    rows = problems("math/math500.jsonl")[:60]
    by_solution = MathVerify(answer="solution")
    by_solution._pool = reward._pool
    texts = [rf"It is \boxed{{{row['answer']}}}." for row in rows]
    assert by_solution(batch(texts, rows)).values[:, 0].tolist() == [1.0] * len(rows)


EQUAL = [
    ("27.0", "27"),
    ("27", "27.0"),
    (27.0, "27"),
    (27, "27.0"),
    (r"\frac12", "0.5"),
    (r"\frac12", "1/2"),
    (r"\frac{1}{2}", r"\dfrac12"),
    ("0.5", r"\frac{2}{4}"),
    (r"\frac13", "0.333333"),
    ("1,000", "1000"),
    ("1000", r"1\,000"),
    ("1000", "1{,}000"),
    ("1000", r"\$1,000"),
    (r"\text{(C)}", "C"),
    ("C", r"\textbf{(C)}"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    ("[2,5)", "[2, 5)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("[-2,7]", r"x \in [-2, 7]"),
    (r"(-\infty,2)\cup(3,4]", r"(3,4] \cup (-\infty, 2)"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"90^\circ", "90"),
    ("90", r"90^{\circ}"),
    ("90", "90°"),
    (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{bmatrix}1\\-2\end{bmatrix}"),
    ("5", r"5\text{ cm}"),
    ("5", r"5\ \mathrm{cm}^2"),
    ("5", "x = 5"),
    ("1,-2", "-2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\pi}{2}", "π/2"),
    (r"(x+1)^2", "x^2+2x+1"),
    (r"11\frac{1}{2}", "11.5"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\infty", "∞"),
    ("-3", "\u22123"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"3 \cdot 10^2", "300"),
    (r"52_8", r"52_{8}"),
    (r"\text{east}", r"{\text{east}}"),
    (r"(1,2)", r"{(1,2)}"),
]
DIFFERENT = [
    (r"\frac12", "0.51"),
    (r"\frac13", "0.333"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("[1,2)", "(1,2]"),
    ("2", "-2"),
    ("12", "1,2"),
    ("1,2", "12"),
    ("1.2", "1,2"),
    ("1000", "1.000"),
    ("1000", "1,00"),
    ("x=5", "x=-5"),
    ("5", "y=6"),
    (r"\text{(A)}", r"\text{(B)}"),
    (r"\text{east}", r"\text{seat}"),
    (r"\text{even}", r"\text{odd}"),
    ("ABCD", "DCBA"),
    (r"\text{ABC}", "CBA"),
    ("x+1", "y+1"),
    ("1,2,3", "1,2"),
    ("3", "1,2,3"),
    ("5", r"5 \text{ or } 6"),
    ("52_8", "52_9"),
    ("10", "100"),
    ("10", "10x"),
    ("100000000", "100000001"),
    ("0", "0.00001"),
    ("1", "0.99999"),
    (r"2 \le x", "2 < x"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("i", "-i"),
    ("x^2", "x^3"),
]


def test_equal_answers_score_one_and_near_misses_zero(reward: MathVerify) -> None:
    pairs = EQUAL + DIFFERENT
    output = score(reward, [rf"So \boxed{{{answer}}}." for _, answer in pairs], [gold for gold, _ in pairs])
    values = dict(zip(pairs, output.values[:, 0].tolist(), strict=True))
    assert [pair for pair in EQUAL if values[pair] != 1.0] == []
    assert [pair for pair in DIFFERENT if values[pair] != 0.0] == []


def test_equal_answers_vote_as_one(reward: MathVerify) -> None:
    texts = [rf"\boxed{{{answer}}}" for answer in ("0.5", r"\frac{2}{4}", "1/2", "0.50", "2", "2.0")] + ["none"]
    output = score(reward, texts, [r"\frac12"] * 7)
    assert output.answers == (r"\frac12",) * 4 + ("2", "2", None)


def test_wrong_unparseable_and_not_applicable_are_told_apart(reward: MathVerify) -> None:
    cases = [
        (r"\boxed{4}", "4", 1.0, "scored", CORRECT),
        (r"\boxed{5}", "4", 0.0, "scored", WRONG),
        ("no answer at all", "4", 0.0, "unparseable", WRONG),
        (r"\boxed{???}", "4", 0.0, "unparseable", WRONG),
        (r"\boxed{", "4", 0.0, "unparseable", WRONG),
        (r"\boxed{}", "4", 0.0, "unparseable", WRONG),
        ("no answer at all", r"\sqrt2", 0.0, "unparseable", WRONG),
        (r"\boxed{4}", None, math.nan, "not_applicable", UNKNOWN),
        (r"\boxed{4}", "", math.nan, "not_applicable", UNKNOWN),
        (r"\boxed{???}", "???", math.nan, "not_applicable", UNKNOWN),
        ("no answer at all", "???", math.nan, "not_applicable", UNKNOWN),
    ]
    output = score(reward, [case[0] for case in cases], [case[1] for case in cases])
    values = output.values[:, 0].tolist()
    assert [repr(v) for v in values] == [repr(case[2]) for case in cases]
    assert output.status == (tuple(case[3] for case in cases),)
    assert output.correct.tolist() == [case[4] for case in cases]


def test_a_gold_answer_that_cannot_be_used_is_reported_with_its_row(reward: MathVerify) -> None:
    rows = [{"answer": a} for a in ("4", r"\sqrt{2}", "???", None, "", float("nan"), ["4"], r"\frac{1}{2}")]
    assert reward.check_rows([*rows, {"question": "?"}]) == [
        (2, "'???' is not an expression"),
        (3, "None is not an answer"),
        (4, "'' is not an answer"),
        (5, "nan is not an answer"),
        (6, "['4'] is not an answer"),
        (8, "no column 'answer'"),
    ]


HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{2^{2^{2^{2^{2^{2}}}}}}",
    r"\boxed{((((9!)!)!)!)!}",
    r"\boxed{99999999999!}",
    r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    r"\boxed{" + "{" * 50_000 + "}" * 50_001,
    "{" * 100_000,
    r"\boxed{" + "{" * 100_000,
    r"\boxed{1e9999999999}",
    r"\boxed{10^{9999999999}}",
    r"\boxed{" + r"\frac{1}{" * 2000 + "2" + "}" * 2001,
    r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    r"\boxed{" + "7" * 100_000 + "}",
    "\\boxed{5\x00}",
    "\\boxed{5\ud800}",
    "\\boxed{\U0001d7d3}",
    r"\boxed{(x+y+z+w+1)^{200}}",
]


@pytest.mark.slow
def test_hostile_text_costs_one_deadline_at_most_and_the_next_item_is_scored() -> None:
    reward = MathVerify(workers=2, timeout_s=1.5, memory_mb=2048)
    texts, golds = [], []
    for text in HOSTILE:
        texts += [text, r"\boxed{\frac{2}{4}}"]
        golds += [r"\sqrt{7}", "0.5"]
    try:
        output = score(reward, texts, golds)
        replaced = reward._pool.replaced
    finally:
        reward.teardown()
    hostile, next_items = output.status[0][::2], output.status[0][1::2]
    assert set(next_items) == {"scored"} and (output.correct[1::2] == CORRECT).all()
    assert (output.correct[::2] != CORRECT).all(), "nonsense was scored as right"
    lost = [status in ("timed_out", "crashed") for status in hostile]
    assert output.values[::2, 0].isnan().tolist() == lost
    assert (output.correct[::2] == UNKNOWN).tolist() == lost
    # Which of them hang is up to the library's version; that a power tower and braces do is the reason for the pool.
    assert hostile[0] == hostile[5] == "timed_out" and hostile.count("timed_out") <= replaced


def test_an_answer_that_a_whole_group_gives_is_compared_once() -> None:
    with_one = MathVerify(workers=1, timeout_s=0.5)
    try:
        output = score(with_one, [r"\boxed{9^{9^{9^9}}}"] * 8, [r"\sqrt2"] * 8)
        assert output.status == (("timed_out",) * 8,) and with_one._pool.replaced == 1
    finally:
        with_one.teardown()


def test_it_scores_off_the_main_thread(reward: MathVerify) -> None:
    outputs: list[RewardOutput] = []
    thread = threading.Thread(target=lambda: outputs.append(score(reward, [r"\boxed{\sqrt{4}}"], ["2"])))
    thread.start()
    thread.join(timeout=60)
    assert outputs[0].correct.tolist() == [CORRECT] and outputs[0].status == (("scored",),)


def test_it_starts_its_processes_when_they_are_needed_and_ends_them() -> None:
    reward = MathVerify(workers=1)
    assert score(reward, [r"\boxed{4}"], ["4"]).correct.tolist() == [CORRECT]
    assert reward._pool.pids == (), "two plain numbers need no parser"
    assert score(reward, [r"\boxed{\sqrt{16}}"], ["4"]).correct.tolist() == [CORRECT]
    assert len(reward._pool.pids) == 1
    reward.teardown()
    assert reward._pool.pids == ()


def test_weight_and_name_reach_the_output(reward: MathVerify) -> None:
    weighted = MathVerify(weight=0.5)
    weighted._pool = reward._pool
    output = score(weighted, [r"\boxed{4}"], ["4"])
    assert (output.names, output.weights, output.total.tolist()) == (("math_verify",), (0.5,), [0.5])


def test_a_missing_column_and_bad_arguments_are_refused(reward: MathVerify) -> None:
    with pytest.raises(DataError, match="reward math_verify: the data has no column 'answer'"):
        reward(batch([r"\boxed{4}"], [{"question": "?"}]))
    with pytest.raises(ConfigError) as caught:
        MathVerify(timeout_s=0)
    assert str(caught.value) == "model.rewards: math_verify.timeout_s\n    got:      0\n    expected: more than 0"


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillkit.rewards.math_verify.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        MathVerify().setup()
    assert str(caught.value) == (
        "model.rewards: math_verify needs the package math-verify\n"
        "    got:      no module named math_verify\n"
        "    expected: math-verify 0.9 or later\n"
        "    try:      pip install 'math-verify>=0.9'"
    )


def test_gold_answers_are_read_as_the_sets_write_them() -> None:
    for name in SETS:
        for row in problems(name):
            mine, theirs = gold_answer(row["answer"]), written(row)
            assert mine == theirs or (mine is not None and value(mine) == value(theirs) is not None)
