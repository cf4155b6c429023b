"""Gradients formed before the loss is known: right where the loss is linear in the scores, done again where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from distillkit import chunks
from distillkit.divergences.full import ReverseKL
from distillkit.divergences.sampled import K1
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.trrd import TRRD
from distillkit.prepared import StepSettings
from distillkit.scorer import StudentScorer
from distillkit.step import DistillationStep
from tests import toy
from tests.test_step import PROMPTS, EvenDigits, GradientBackend, build, close, kdrl

Build = Callable[[StudentScorer], DistillationStep]

RIGHT: dict[str, Build] = {
    "grpo": lambda scorer: build(objective=GRPO(), rewards=[EvenDigits()], scorer=scorer),
    "reverse KL": lambda scorer: build(divergence=ReverseKL(), scorer=scorer),
    "kdrl": lambda scorer: kdrl(scorer=scorer),
    "kdrl, exact": lambda scorer: build(
        objective=GRPO(), divergence=ReverseKL(), rewards=[EvenDigits()], scorer=scorer
    ),
    "two temperatures": lambda scorer: kdrl(StepSettings(distil_temperature=2.0), scorer),
    "several micro-batches": lambda scorer: kdrl(StepSettings(tokens_per_micro_batch=30), scorer),
    "nothing skipped": lambda scorer: kdrl(StepSettings(skip_zero_weight=False), scorer),
}
WRONG: dict[str, Build] = {
    "the divergence is an advantage": lambda scorer: build(
        objective=GRPO(), divergence=K1(), rewards=[EvenDigits()], scorer=scorer,
        settings=StepSettings(distill_through="advantage"),
    ),
    "a ratio to the teacher": lambda scorer: build(objective=TRRD(), rewards=[EvenDigits()], scorer=scorer),
}  # fmt: skip
NONE: dict[str, Build] = {
    "another old policy": lambda scorer: kdrl(StepSettings(inner_epochs=2), scorer),
}


def run(
    make: Build, steps: int = 1, *, guesses: bool = True, tied: bool = False
) -> tuple[Sequence[Tensor], list[bool]]:
    """The gradients of some steps, and whether each guess was right."""
    right: list[bool] = []

    class Noted(chunks.Guess):
        def is_right(self, gradients: Sequence[Tensor | None]) -> bool:
            right.append(super().is_right(gradients))
            return right[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distillkit.scorer.Guess", Noted)
        if not guesses:
            patch.setattr(StudentScorer, "_guess", lambda *_: None)
        step = make(toy.scorer(0, head_chunk=3, tied=tied))
        backend = GradientBackend(step.scorer, lr=0.01)
        for n in range(steps):
            step.run(toy.requests(PROMPTS), step=n, backend=backend)
    return backend.gradients, right


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*RIGHT, *WRONG, *NONE])
def test_the_gradient_is_the_same_with_and_without_guesses(name: str, tied: bool) -> None:
    make = {**RIGHT, **WRONG, **NONE}[name]
    guessed, right = run(make, tied=tied)
    plain, none = run(make, tied=tied, guesses=False)
    assert not none
    assert (set(right) == {True}) if name in RIGHT else (right == [False]) if name in WRONG else not right
    for ours, theirs in zip(guessed, plain, strict=True):
        close(ours, theirs, 1e-6)


@pytest.mark.parametrize("name", list(WRONG))
def test_no_more_guesses_after_a_wrong_one(name: str) -> None:
    gradients, right = run(WRONG[name], steps=3)
    assert right == [False] and len(gradients) == 3


def test_no_guess_where_logits_are_kept_anyway() -> None:
    def whole(scorer: StudentScorer) -> DistillationStep:
        scorer.head_chunk = None
        return kdrl(scorer=scorer)

    assert run(whole)[1] == []


def test_a_right_guess_computes_no_logits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = chunks.project

    def counted(hidden: Tensor, *rest: Tensor) -> Tensor:
        made.append(len(hidden))
        return plain(hidden, *rest)

    monkeypatch.setattr(chunks, "project", counted)
    run(RIGHT["grpo"])
    once = sum(made)
    made.clear()
    run(RIGHT["grpo"], guesses=False)
    assert sum(made) == 2 * once


def test_a_column_without_gradient_is_not_gone_back_through(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[int] = []
    plain = chunks.torch.autograd.grad

    def counted(outputs: Any, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
        if isinstance(outputs, list):  # of a block; the guess itself goes back from a loss
            columns.append(len(outputs))
        return plain(outputs, *rest, **named)

    monkeypatch.setattr(chunks.torch.autograd, "grad", counted)
    run(RIGHT["reverse KL"])
    assert set(columns) == {1}  # the divergence, not the log-probs beside it
