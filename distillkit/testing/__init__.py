"""For authors of parts: fakes to write tests with, and one conformance suite per slot.

    from distillkit.testing import check

    def test_my_divergence_keeps_the_contract():
        check(MyDivergence(sharpness=2.0))

`check(part)` runs the suite of the part's slot and raises `ConformanceError` with every broken rule;
`check_divergence`, `check_beta`, `check_masker`, `check_objective`, `check_reward`, `check_teacher`, `check_sampler` do
so by name and take the inputs that a part needs (a reward's columns, a teacher's own student). `check_class(kind, cls)`
is the cheap part behind `distillkit components --check`: what can be said of a class without arguments, models or
files.

Fakes: `rollout_batch`, `reward_output`, `FakeTeacher`, `FakeSampler`, and a character tokenizer with a tiny random
model (`tiny_student`, `student_info`), all made on the spot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distillkit.components import (
    BetaScheduler,
    Component,
    DivergenceEstimator,
    Masker,
    PolicyObjective,
    RewardFn,
    RolloutSampler,
    TeacherScorer,
)
from distillkit.errors import DataError
from distillkit.testing.batch_suites import check_masker, check_objective
from distillkit.testing.constructor import constructor_problems, required_arguments
from distillkit.testing.fakes import (
    FakeSampler,
    FakeTeacher,
    char_tokenizer,
    encode,
    reward_output,
    rollout_batch,
    sample_requests,
    student_info,
    tiny_model,
    tiny_student,
)
from distillkit.testing.findings import ConformanceError
from distillkit.testing.reward_suite import check_reward
from distillkit.testing.sampler_suite import check_sampler
from distillkit.testing.teacher_suite import check_teacher
from distillkit.testing.token_suites import check_beta, check_divergence

__all__ = [
    "ConformanceError",
    "FakeSampler",
    "FakeTeacher",
    "char_tokenizer",
    "check",
    "check_beta",
    "check_class",
    "check_divergence",
    "check_masker",
    "check_objective",
    "check_reward",
    "check_sampler",
    "check_teacher",
    "encode",
    "reward_output",
    "rollout_batch",
    "sample_requests",
    "student_info",
    "tiny_model",
    "tiny_student",
]

_SUITES: dict[str, tuple[type[Component], Callable[..., None]]] = {
    "sampler": (RolloutSampler, check_sampler),
    "teacher": (TeacherScorer, check_teacher),
    "reward": (RewardFn, check_reward),
    "divergence": (DivergenceEstimator, check_divergence),
    "beta": (BetaScheduler, check_beta),
    "masker": (Masker, check_masker),
    "objective": (PolicyObjective, check_objective),
}

_NEEDS_MODELS = frozenset({"sampler", "teacher"})


def check(part: Component, **given: Any) -> None:
    """Run the conformance suite of `part`'s slot.

    Args:
        part: a constructed part.
        given: inputs for the suite, by the names that the slot's own `check_...` function has.

    Raises:
        ConformanceError: with every broken rule.

    Example:
        >>> from distillkit.divergences.sampled import K2
        >>> check(K2())
    """
    suite = _SUITES.get(getattr(part, "kind", ""))
    if suite is None or not isinstance(part, suite[0]):
        got = f"{type(part).__name__} of kind {getattr(part, 'kind', None)!r}"
        raise ConformanceError(got, [f"is none of {', '.join(base.__name__ for base, _ in _SUITES.values())}"])
    suite[1](part, **given)


def check_class(kind: str, cls: type) -> str:
    """Check what can be checked of a class alone, in seconds.

    Its base class and the rules for its constructor; then the slot's suite on an instance, where defaults suffice to
    make one and the slot needs no model. A reward whose columns the suite's own rows lack keeps to the first part.

    Returns:
        What was checked: `constructor`, or `constructor and suite`.

    Raises:
        ConformanceError: with every broken rule.
    """
    base, suite = _SUITES[kind]
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise ConformanceError(
            getattr(cls, "__name__", repr(cls)), [f"is no {kind}: {base.__name__} is not its base class"]
        )
    if problems := constructor_problems(cls):
        raise ConformanceError(cls.__name__, problems)
    if required_arguments(cls) or kind in _NEEDS_MODELS:
        return "constructor"
    try:
        suite(cls())
    except DataError:
        return "constructor"
    return "constructor and suite"
