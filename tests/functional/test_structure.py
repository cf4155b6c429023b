"""The structural reward, worked by hand."""

from __future__ import annotations

import itertools

import pytest

from distillkit.errors import ShapeError
from distillkit.functional.structure import coverage, structural_reward


@pytest.mark.parametrize(
    ("meta", "question", "answer", "reward"),
    [
        ([], [], [], 0.0),
        ([True], [True], [True], 1.0),
        ([True], [False], [True], 0.5),
        ([True], [True], [False], 0.5),
        ([True], [False], [False], 0.25),
        ([False], [True], [True], 0.0),
        ([True] * 3, [True] * 3, [True] * 3, 3.0),  # not divided by the number of steps
        ([True, False, True, True], [True] * 4, [True] * 4, 1.0),  # the branch taken at step 2 ends it
        ([True, True, False], [True, False, True], [False, False, True], 0.75),
        ([False, True, True], [True] * 3, [True] * 3, 0.0),
    ],
)
def test_by_hand(meta: list[bool], question: list[bool], answer: list[bool], reward: float) -> None:
    assert structural_reward(meta, question, answer) == reward


def test_against_the_recursion_on_every_case_of_three_steps() -> None:
    cases = list(itertools.product([False, True], repeat=9))
    for bits in cases:
        meta, question, answer = bits[:3], bits[3:6], bits[6:]
        g, total = 1.0, 0.0
        for m, q, a in zip(meta, question, answer, strict=True):
            g *= float(m)
            total += g * 0.5 ** float(not q) * 0.5 ** float(not a)
        assert structural_reward(meta, question, answer) == total
    assert len({structural_reward(b[:3], b[3:6], b[6:]) for b in cases}) > 10


def test_what_stands_behind_a_mismatch_is_not_read() -> None:
    ended = structural_reward([True, False, True], [True, True, True], [True, True, True])
    for tail in itertools.product([False, True], repeat=4):
        assert structural_reward([True, False, tail[0]], [True, tail[1], tail[2]], [True, tail[3], True]) == ended


def test_sequences_of_different_lengths_are_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        structural_reward([True, True], [True], [True, False])
    assert str(caught.value) == (
        "structural_reward: meta_match, question_match and answer_match\n"
        "    got:      2, 1 and 2 entries\n"
        "    expected: one entry per compared step in each"
    )


def test_coverage() -> None:
    assert [coverage(s, 4) for s in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(("student", "teacher"), [(-1, 2), (2, 0)])
def test_coverage_of_impossible_counts_is_refused(student: int, teacher: int) -> None:
    with pytest.raises(ShapeError) as caught:
        coverage(student, teacher)
    assert str(caught.value) == (
        f"coverage\n    got:      {student} steps of the student, {teacher} of the teacher\n"
        "    expected: at least 0 and at least 1"
    )
