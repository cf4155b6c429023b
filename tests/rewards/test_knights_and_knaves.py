"""`knights_and_knaves`: role lists read as a person would, on hand-made texts and on every puzzle of the real set."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from distillkit.errors import DataError
from distillkit.rewards.knights_and_knaves import KnightsAndKnaves, read_roles
from distillkit.types import CORRECT, UNKNOWN, WRONG
from tests.rewards.batches import batch, problems

FILES = [f"knights_and_knaves/{people}ppl_{split}.parquet" for people in range(3, 8) for split in ("train", "test")]
NAMES = ["Zoey", "Bob", "Ann"]
RIGHT = {"Zoey": "knight", "Bob": "knave", "Ann": "knight"}
LIST = "(1) Zoey is a knight\n(2) Bob is a knave\n(3) Ann is a knight"


@pytest.mark.parametrize("name", FILES)
def test_every_gold_role_list_scores_one_and_one_wrong_role_zero(name: str) -> None:
    reward, rows = KnightsAndKnaves(), problems(name)
    assert len(rows) == (900 if "train" in name else 100)
    assert reward.check_rows(rows) == []
    thought = [f"<think>{' '.join(row['cot_repeat_steps'])}</think>\n" for row in rows]
    lists = [row["solution_text_format"] for row in rows]
    rng = random.Random(0)
    wrong = []
    for row, text in zip(rows, lists, strict=True):
        lines = text.split("\n")
        i = rng.randrange(len(lines))
        swap = {"knight": "knave", "knave": "knight"}
        head, _, role = lines[i].rpartition(" ")
        lines[i] = f"{head} {swap[role]}"
        wrong.append("\n".join(lines))
        assert lines[i].startswith(f"({i + 1}) {row['names'][i]} is a ")
    for texts, value in (
        ([f"{a}<answer>\n{b}\n</answer>" for a, b in zip(thought, lists, strict=True)], 1.0),
        ([a + b for a, b in zip(thought, lists, strict=True)], 1.0),
        ([row["solution_text"] for row in rows], 1.0),
        ([f"{a}<answer>\n{b}\n</answer>" for a, b in zip(thought, wrong, strict=True)], 0.0),
    ):
        output = reward(batch(texts, rows))
        assert output.values[:, 0].tolist() == [value] * len(rows)
        assert (output.correct == (CORRECT if value else WRONG)).all() and set(output.status[0]) == {"scored"}


@pytest.mark.parametrize("name", FILES)
def test_another_rows_role_list_scores_zero_unless_it_is_the_same(name: str) -> None:
    rows = problems(name)
    roles = [dict(zip(row["names"], row["solution"], strict=True)) for row in rows]
    texts = [f"<answer>{rows[i - 1]['solution_text_format']}</answer>" for i in range(len(rows))]
    expected = [float(roles[i - 1] == roles[i]) for i in range(len(rows))]
    assert KnightsAndKnaves()(batch(texts, rows)).values[:, 0].tolist() == expected


@pytest.mark.parametrize(
    "text",
    [
        LIST,
        f"<answer>{LIST}</answer>",
        f"<ANSWER> {LIST.replace(chr(10), ' ')} </ANSWER> Good luck!",
        "(3) Ann is a knight (1) zoey is a KNIGHT (2) BOB is a Knave",
        "Zoey is a knight, Bob is a knave, and Ann is a knight.",
        "1. **Zoey** is a **knight**.\n2. **Bob** is a **knave**.\n3. **Ann** is a **knight**.",
        "- Zoey: knight\n- Bob: knave\n- Ann: knight",
        "| Zoey | knight |\n| Bob | knave |\n| Ann | knight |",
        "Zoey = Knight; Bob = Knave; Ann = Knight",
        "Zoey is a knight, Bob is not a knight, and Ann is not a knave.",
        "(1) Zoey is a knight: she is right about Bob.\n(2) Bob is a knave, for he lies.\n(3) Ann is a knight then.",
        "<answer>Zoey is a knight since Bob lies. Bob is a knave since he does. Ann is a knight.</answer>",
        f"If Zoey is a knave then Bob is a knight and Ann is a knight.</think>{LIST}",
        f"(1) Zoey is a knave (2) Bob is a knave (3) Ann is a knave. No, that is wrong.\n{LIST}",
        f"(1) Zoey is a knave (2) Bob is a knave (3) Ann is a knave {LIST}",
        f"<answer>(1) Zoey is a knave (2) Bob is a knight (3) Ann is a knave</answer> No: <answer>{LIST}</answer>",
        f"{LIST}\nThis agrees with what Bob, who is a liar, said.",
    ],
)
def test_the_last_whole_list_is_the_answer(text: str) -> None:
    assert read_roles(text, NAMES) == RIGHT


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("<answer>(1) Zoey is a knight (2) Bob is a knave</answer>", {"Zoey": "knight", "Bob": "knave", "Ann": None}),
        (f"<answer>{LIST}, and Zoey is a knave</answer>", {"Zoey": None, "Bob": "knave", "Ann": "knight"}),
        (f"{LIST}\n(4) Max is a knave", {"Zoey": None, "Bob": None, "Ann": None}),
        (f"{LIST} <answer>I do not know</answer>", None),
        (f"<think>{LIST}</think> I do not know", None),
        ("Zoey is a knight and Bob is a knave.", None),
        ("(1) Zoey is a knight", None),
        ("Everybody is a knight", None),
        ("Zoey is a knightly person, Bob is a knave, Ann is a knight", None),
        ("", None),
    ],
)
def test_missing_contradictory_and_strange_roles_are_no_answer(text: str, roles: object) -> None:
    assert read_roles(text, NAMES) == roles


def test_incorrect_unparseable_and_not_applicable_are_told_apart() -> None:
    row: dict[str, Any] = {"names": NAMES, "solution": [True, False, True]}
    cases = [
        (LIST, row, 1.0, "scored", CORRECT),
        (LIST.replace("knave", "knight"), row, 0.0, "scored", WRONG),
        ("<answer>(1) Zoey is a knight (2) Bob is a knave</answer>", row, 0.0, "scored", WRONG),
        (f"<answer>{LIST}, Zoey is a knave</answer>", row, 0.0, "scored", WRONG),
        ("no idea", row, 0.0, "unparseable", WRONG),
        (LIST, {"names": NAMES, "solution": [True, False]}, math.nan, "not_applicable", UNKNOWN),
        (LIST, {"names": None, "solution": None}, math.nan, "not_applicable", UNKNOWN),
        (LIST, {"names": NAMES, "solution": LIST}, 1.0, "scored", CORRECT),
        (LIST, {"names": np.array(NAMES), "solution": np.array([True, False, True])}, 1.0, "scored", CORRECT),
    ]
    output = KnightsAndKnaves(weight=2.0)(batch([case[0] for case in cases], [case[1] for case in cases]))
    assert [repr(value) for value in output.values[:, 0].tolist()] == [repr(case[2]) for case in cases]
    assert output.status[0] == tuple(case[3] for case in cases)
    assert output.correct.tolist() == [case[4] for case in cases]
    assert (output.names, output.weights) == (("knights_and_knaves",), (2.0,))
    assert output.answers[0] == output.answers[7] == "Zoey: knight, Bob: knave, Ann: knight"
    assert output.answers[2] == "Zoey: knight, Bob: knave, Ann: ?" and output.answers[4] is None


def test_rows_without_a_usable_solution_are_reported() -> None:
    rows = [
        {"names": NAMES, "solution": [True, False, True]},
        {"names": NAMES, "solution": [True, False]},
        {"names": ["Zoey", "zoey"], "solution": [True, False]},
        {"names": NAMES, "solution": ["knight", "knave", "knight"]},
        {"names": NAMES, "solution": "(1) Zoey is a knight"},
        {"names": NAMES, "solution": None},
        {"solution": [True]},
        {"names": NAMES, "solution": LIST},
    ]
    bad = KnightsAndKnaves().check_rows(rows)
    assert [i for i, _ in bad] == [1, 2, 3, 4, 5, 6]
    assert bad[0][1] == "names ['Zoey', 'Bob', 'Ann'] and solution [True, False] do not match"
    assert bad[-1][1] == "no column 'names'"
    with pytest.raises(DataError, match="reward knights_and_knaves: the data has no column 'names'"):
        KnightsAndKnaves()(batch([LIST], [{"solution": [True]}]))


@pytest.mark.parametrize("text", ["<answer>" * 20_000, "Zoey " * 20_000, "(1) " * 30_000, "Zoey is a " * 10_000])
def test_long_nonsense_is_read_at_once(text: str) -> None:
    assert read_roles(text, NAMES) is None
