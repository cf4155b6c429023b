"""Which steps of student and teacher agree, for all rollouts of a batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distillkit.decomposition import Decomposition
from distillkit.rewards.gsrm.judge import StepPair

__all__ = ["Agreement", "Case", "align"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One rollout to compare: both decompositions, and the problem they are of."""

    student: Decomposition
    teacher: Decomposition
    problem: str


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the judge said of the compared steps, in order, the first meta mismatch included and nothing after it.

    At that mismatch `question` and `answer` are False without having been asked.
    """

    meta: tuple[bool, ...] = ()
    question: tuple[bool, ...] = ()
    answer: tuple[bool, ...] = ()

    def then(self, meta: bool, question: bool, answer: bool) -> Agreement:
        """Return the agreement with one more step."""
        return Agreement(meta=(*self.meta, meta), question=(*self.question, question), answer=(*self.answer, answer))


def align(
    cases: Sequence[Case], agree: Callable[[Sequence[StepPair]], Sequence[bool | None]]
) -> list[Agreement | None]:
    """Compare step i of every rollout before step i + 1 of any: two calls of the judge per step, however many rollouts.

    The first call asks about the meta-reasoning; those that agree are asked about question and answer, the others end
    there. Steps beyond the shorter of two traces are not compared.

    Args:
        cases: what to compare.
        agree: the judge; None is "said neither yes nor no".

    Returns:
        One agreement per case, None where the judge left something undecided.
    """
    found: list[Agreement | None] = [Agreement()] * len(cases)
    alive = list(range(len(cases)))
    step = 0
    while alive := [i for i in alive if step < min(len(cases[i].student.steps), len(cases[i].teacher.steps))]:
        metas = agree([_pair(cases[i], step, "meta") for i in alive])
        going = [i for i, meta in zip(alive, metas, strict=True) if meta]
        for i, meta in zip(alive, metas, strict=True):
            before = found[i]
            assert before is not None
            if meta is None:
                found[i] = None
            elif not meta:
                found[i] = before.then(False, False, False)
        details = (
            agree([_pair(cases[i], step, kind) for i in going for kind in ("question", "answer")]) if going else ()
        )
        for place, i in enumerate(going):
            question, answer = details[2 * place : 2 * place + 2]
            before = found[i]
            assert before is not None
            found[i] = None if question is None or answer is None else before.then(True, question, answer)
        alive = [i for i in going if found[i] is not None]
        step += 1
    return found


def _pair(case: Case, step: int, kind: str) -> StepPair:
    ours, theirs = (getattr(side.steps[step], kind) for side in (case.student, case.teacher))
    return StepPair(kind=kind, ours=ours, theirs=theirs, problem=case.problem)  # type: ignore[arg-type]
