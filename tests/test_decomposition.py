"""One grammar: what is asked for, what is trained on and what is read are the same."""

from __future__ import annotations

import random
import re

import pytest

from distillkit import decomposition
from distillkit.decomposition import (
    Decomposition,
    DecompositionError,
    ReasoningStep,
    instructions,
    messages,
    parse,
    render,
)

LABELS = [decomposition.META, decomposition.QUESTION, decomposition.ANSWER]
GRAMMAR = "Step 1 / Meta-reasoning: … / Sub-problem: … / Answer: … / … / Final answer: …"

WORDS = [
    "Step", "Step 2", "Step 1", "Meta-reasoning:", "Sub-problem:", "Answer:", "Answer: 4", "Final answer:", "Final",
    "4*2", "8", "x²", "α", "−1", "…", ":", "-", "日本", "\\boxed{1}", "{}", "<think>", "%s", "None", "\x00", "\u200b",
]  # fmt: skip
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u00a0", "\u3000"]


def value(rng: random.Random, *, empty: bool = False) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(0 if empty else 1, 5))]
    return "".join(rng.choice(SPACES) + word + rng.choice(SPACES) for word in words)


def made(rng: random.Random) -> Decomposition:
    steps = [ReasoningStep(meta=value(rng), question=value(rng), answer=value(rng)) for _ in range(rng.randint(1, 12))]
    return Decomposition(steps=tuple(steps), final=value(rng, empty=True))


def tidy(text: str) -> str:
    return " ".join(text.split())


def test_any_decomposition_comes_back_from_its_training_target() -> None:
    rng = random.Random(0)
    for _ in range(500):
        given = made(rng)
        expected = Decomposition(
            steps=tuple(
                ReasoningStep(meta=tidy(s.meta), question=tidy(s.question), answer=tidy(s.answer)) for s in given.steps
            ),
            final=tidy(given.final),
        )
        target = render(given)
        assert parse(target) == expected
        assert render(parse(target)) == target
        assert len(target.split("\n")) == 4 * len(given.steps) + 1


def test_a_target_is_read_however_its_lines_are_spaced() -> None:
    given = Decomposition(steps=(ReasoningStep(meta="m n", question="q", answer="a"),) * 2, final="f")
    for change in ("  {}", "{}  ", "{}\r", "{}\n", "\n{}", "\t{}"):
        lines = [change.format(line) for line in render(given).split("\n")]
        assert parse("\n".join(lines)) == given


def test_values_may_run_over_lines() -> None:
    text = "Step 1\nMeta-reasoning: split it\ninto parts\n\nSub-problem:\n4*2\nAnswer: 8\nFinal answer: 8\n"
    step = ReasoningStep(meta="split it into parts", question="4*2", answer="8")
    assert parse(text) == Decomposition(steps=(step,), final="8")


def test_a_model_that_follows_the_instructions_to_the_letter_is_understood() -> None:
    """The block that the instructions show, its places filled in, is a decomposition: no label may drift."""
    told = instructions()
    shown = [line for line in told.split("\n") if line.startswith(("Step ", *LABELS, "Final answer:"))]
    assert [line.split(" ")[0].rstrip(":") for line in shown] == [
        "Step",
        "Meta-reasoning",
        "Sub-problem",
        "Answer",
        "Final",
    ]
    filled = [re.sub(r"<number, from 1>", "1", line) for line in shown]
    read = parse("\n".join(filled))
    assert len(read.steps) == 1
    [step] = read.steps
    for label, text in zip(LABELS, (step.meta, step.question, step.answer), strict=True):
        assert f"{label} {text}" in told
    assert read.final == "<what the reasoning ends with>"
    assert parse(render(read)) == read


def test_training_and_inference_ask_the_same() -> None:
    system, user = messages("1+1?", "one and one\nis two")
    assert system == {"role": "system", "content": instructions()}
    assert user == {"role": "user", "content": "Problem:\n1+1?\n\nReasoning:\none and one\nis two"}


def test_no_single_line_can_be_lost_doubled_or_moved_unnoticed() -> None:
    rng = random.Random(1)
    for _ in range(100):
        count = rng.randint(1, 4)
        steps = tuple(ReasoningStep(meta=f"m{i}", question=f"q{i}", answer=f"a{i}") for i in range(count))
        lines = render(Decomposition(steps=steps, final="f")).split("\n")
        i, j = rng.sample(range(len(lines)), 2)
        swapped = list(lines)
        swapped[i], swapped[j] = lines[j], lines[i]
        changed = [[*lines[:i], *lines[i + 1 :]], [*lines[: i + 1], lines[i], *lines[i + 1 :]]]
        if lines[i].split(" ")[0] != lines[j].split(" ")[0]:
            changed.append(swapped)
        for broken in changed:
            with pytest.raises(DecompositionError):
                parse("\n".join(broken))


def test_a_text_cut_anywhere_before_its_last_line_is_no_decomposition() -> None:
    steps = (ReasoningStep(meta="m", question="q", answer="a"), ReasoningStep(meta="n", question="r", answer="b"))
    text = render(Decomposition(steps=steps, final="b"))
    for end in range(text.index("Final answer:") + len("Final answer")):
        with pytest.raises(DecompositionError):
            parse(text[:end])


BLOCK = "Step 1\nMeta-reasoning: m\nSub-problem: q\nAnswer: a"


@pytest.mark.parametrize(
    ("text", "why", "got"),
    [
        ("", "labels missing, repeated or out of order", "'0 steps, 0 labels'"),
        ("Final answer: 3", "labels missing, repeated or out of order", "'0 steps, 1 labels'"),
        ("Sure! Here it is:\n" + BLOCK, "text outside a block", "'Sure! Here it is:'"),
        ("Step 1\nlet me see\nMeta-reasoning: m", "text outside a block", "'let me see'"),
        (BLOCK, "labels missing, repeated or out of order", "'1 steps, 4 labels'"),
        (
            "Step 1\nPlan: m\nSub-problem: q\nAnswer: a\nFinal answer: a",
            "text outside a block",
            "'Plan: m'",
        ),
        (
            BLOCK.replace("Sub-problem", "Answer") + "\nFinal answer: a",
            "labels missing, repeated or out of order",
            "\"3: 'Answer:' for 'Sub-problem:'\"",
        ),
        (BLOCK.replace("Step 1", "Step 2") + "\nFinal answer: a", "block 1 has another number", "'2'"),
        (f"{BLOCK}\n{BLOCK}\nFinal answer: a", "block 2 has another number", "'1'"),
        (BLOCK.replace(": q", ":") + "\nFinal answer: a", "step 1 has an empty part", "['m', '', 'a']"),
        (BLOCK.replace("Step 1", "Step 1:") + "\nFinal answer: a", "text outside a block", "'Step 1:'"),
        (BLOCK.replace("Answer", "answer") + "\nFinal answer: a", "labels missing, repeated or out of order", None),
    ],
)
def test_what_is_no_decomposition_is_said_in_full(text: str, why: str, got: str | None) -> None:
    with pytest.raises(DecompositionError) as caught:
        parse(text)
    shown = got if got is not None else "\"4: 'Final answer:' for 'Answer:'\""
    assert str(caught.value) == f"decomposition: {why}\n    got:      {shown}\n    expected: {GRAMMAR}"


def test_what_cannot_be_a_target_is_said_in_full() -> None:
    with pytest.raises(DecompositionError) as caught:
        render(Decomposition(steps=()))
    assert str(caught.value) == "decomposition: no steps\n    got:      0 steps\n    expected: at least 1"
    empty = Decomposition(steps=(ReasoningStep(meta="m", question=" \n", answer="a"),))
    with pytest.raises(DecompositionError) as caught:
        render(empty)
    assert str(caught.value) == (
        "decomposition: step 1, Sub-problem is empty\n    got:      ' \\n'\n    expected: text"
    )
