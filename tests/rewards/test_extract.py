"""Finding the final answer in a text, and the form in which answers are compared."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from distillkit.errors import DataError
from distillkit.rewards.extract import final_answer, gold_answer, gold_cell, last_boxed, normal_form, plain_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The answer is $\boxed{18}$.", "18"),
        (r"\boxed{1}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and a stray } here", r"\{1, 2\}"),
        (r"{ { \boxed{ 5 }", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 7$", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{1} then cut off \boxed{2", None),
        (r"\boxed{2", None),
        (r"\boxed{}", ""),
        (r"\boxed", None),
        ("no box {5}", None),
    ],
)
def test_the_last_box_is_read_with_balanced_braces(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"the answer is 3, or rather \boxed{4}", "4"),
        (r"The answer is 5 but \boxed{", None),
        ("9 + 9 = 18\n#### 18", "18"),
        ("#### Step 2\nWe add.\nThe answer is 7.", "7"),
        (r"So the final answer is: $\frac{1}{2}$. Done.", r"\frac{1}{2}"),
        (r"The answer is \(x+1\)", "x+1"),
        ("The answer is 18 dollars because of tax.", "18"),
        ("The answer is $1,250.50.", "1,250.50"),
        ("The answer to your question is 12.", "12"),
        ("**Answer:** 42", "42"),
        ("Answer: **42**", "42"),
        ("The answer is (C).", "(C)"),
        ("The answer is 3 + 4.", "3 + 4"),
        ("The answer is 5 or 6", "5 or 6"),
        ("The answer is 5, 6", "5, 6"),
        ("The answer is $5$ or $6$.", "$5$ or $6$"),
        ("Answer:\n7", "7"),
        ("Answer 1 is wrong.\nThe answer is 2.\nI answer all.", "2"),
        ("We add the two.\n18", "18"),
        ("We add the two.\n**$18**", "18"),
        ("We add the two.\n$\\frac{3}{4}$.", r"\frac{3}{4}"),
        ("We get $x = 18$ after some work", None),
        ("I think it is 18 or so", None),
        ("It takes $3 and then $4", None),
        ("", None),
        ("\n \n", None),
    ],
)
def test_the_final_answer_is_the_first_form_that_is_there(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_only_a_box_counts_where_one_is_required() -> None:
    assert final_answer("The answer is 18.\n#### 18", require_boxed=True) is None
    assert final_answer(r"The answer is \boxed{18}", require_boxed=True) == "18"


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        (27.0, "27"),
        (27, "27"),
        (np.int64(27), "27"),
        (np.float32(0.5), "0.5"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (-3, "-3"),
        (100, "100"),
        (Decimal("2.50"), "2.5"),
        (Fraction(1, 3), "1/3"),
        ("3 * 6 = 18\n#### 18", "18"),
        ("a #### b\n#### 1,000 ", "1,000"),
        (r"Thus $\boxed{\frac{1}{2}}$ is it.", r"\frac{1}{2}"),
        (" \\frac12 ", r"\frac12"),
        ("", None),
        ("  ", None),
        ("####", None),
        (r"\boxed{", None),
        (None, None),
        (True, None),
        (float("nan"), None),
        (float("inf"), None),
        (["18"], None),
        ({"ground_truth": "18"}, None),
    ],
)
def test_the_reference_is_read_from_any_cell(cell: object, answer: str | None) -> None:
    assert gold_answer(cell) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-18", -18),
        ("\u221218", -18),
        ("+18", 18),
        ("007", 7),
        ("27.0", 27),
        (".5", Fraction(1, 2)),
        ("18.", 18),
        ("$18$", 18),
        (r"\$18", 18),
        ("$18", 18),
        ("1,000", 1000),
        ("1{,}000", 1000),
        (r"1\,000\,000.25", Fraction(4000001, 4)),
        (r"1,\!000", 1000),
        ("1 000", 1000),
        ("1e3", 1000),
        ("2.5E-3", Fraction(1, 400)),
        ("1,00", None),
        ("12,3", None),
        ("1,0000", None),
        ("1 2", None),
        (r"\frac12", None),
        (r"50\%", None),
        ("1e9999999999", None),
        ("7" * 61, None),
        ("", None),
        (".", None),
        ("-", None),
        ("e3", None),
        ("1/2", None),
        ("\u0661\u0662", 12),
    ],
)
def test_plain_numbers_are_exact(text: str, value: Fraction | int | None) -> None:
    assert plain_number(text) == value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("27.0", "27", True),
        (r"\text{(C)}", "(C)", True),
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"$x + 1$", "x+1", True),
        (r"\text{ east }", "east", True),
        (r"{(1, 2)}", "(1,2)", True),
        (r"{1}+{2}", "1}+{2", False),
        (r"\{1, 2\}", "1,2", False),
        ("(1, 2)", "(2, 1)", False),
        ("1 2", "12", False),
        ("1  2", "12", False),
        ("a b", "ab", False),
        (r"\leftarrow", r"arrow", False),
        ("12", "1,2", False),
        ("-2", "2", False),
        ("A", "a", False),
    ],
)
def test_normal_forms_are_equal_only_for_equal_answers(one: str, other: str, same: bool) -> None:
    assert (normal_form(one) == normal_form(other)) is same


@pytest.mark.parametrize(
    "text",
    [
        "{" * 100_000,
        "}" * 100_000,
        r"\boxed{" * 20_000,
        r"\boxed{" + "{" * 50_000 + "}" * 50_001,
        r"\boxed" + " " * 100_000,
        "answer to " + " " * 100_000,
        "answer " * 20_000,
        "answer" + "*" * 100_000,
        "the answer is " + "9" * 100_000,
        "9" * 100_000,
        "$" * 100_000,
        "\\" * 100_000,
        r"\text{" * 20_000,
        " " * 100_000 + "1",
        "1," * 50_000,
    ],
    ids=lambda text: f"{text[:12]!r}",
)
def test_reading_is_linear_in_the_text(text: str) -> None:
    start = time.perf_counter()
    for value in (final_answer(text), gold_answer(text), text):
        if value is not None:
            normal_form(value)
            plain_number(value)
    assert time.perf_counter() - start < 2.0


def test_a_missing_column_is_named_with_the_ones_that_are_there() -> None:
    assert gold_cell({"answer": None}, "answer", "math_verify") is None
    with pytest.raises(DataError) as caught:
        gold_cell({"question": "?", "solution": "4"}, "answer", "math_verify")
    assert str(caught.value) == (
        "reward math_verify: the data has no column 'answer'\n"
        "    got:      question, solution\n"
        "    expected: a column with the reference, named 'answer' or by the reward's argument"
    )
