"""How far one reasoning trace follows another: the structural reward of RLKD, from judged steps to a number."""

from __future__ import annotations

from collections.abc import Sequence

from distillkit.errors import ShapeError, problem

__all__ = ["coverage", "structural_reward"]


def structural_reward(
    meta_match: Sequence[bool], question_match: Sequence[bool], answer_match: Sequence[bool]
) -> float:
    """Return Σ_i s_i over the compared steps, up to the first one that turns to another sub-problem.

        g_0 = 1,   g_i = g_{i−1} · [meta_i agrees]
        s_i = g_i · (1/2)^[question_i differs] · (1/2)^[answer_i differs]      ∈ {0, 1/4, 1/2, 1}

    The first mismatch of the meta-reasoning ends the sum: what follows is another branch, however alike it looks. A
    differing question or answer halves its own step only. The sum is in steps and not bounded: dividing it by the
    teacher's steps is the caller's choice.

    See *Distilling the Implicit Multi-Branch Structure in LLMs' Reasoning via Reinforcement Learning* (RLKD), Xu et
    al., 2025, https://arxiv.org/abs/2505.16142; the equations are those of the released code,
    https://github.com/xsc1234/RLKD.

    Args:
        meta_match: for each compared step i = 1..min(N_s, N_t), whether both traces turn to the same sub-problem.
        question_match: whether they put the same question there; not read after the first meta mismatch.
        answer_match: whether they answer it alike; not read after the first meta mismatch.

    Raises:
        ShapeError: the three are not of one length.

    Example:
        >>> structural_reward([True, True, False, True], [True, False, True, True], [True, False, True, True])
        1.25
    """
    if not len(meta_match) == len(question_match) == len(answer_match):
        got = f"{len(meta_match)}, {len(question_match)} and {len(answer_match)} entries"
        where = "structural_reward: meta_match, question_match and answer_match"
        raise ShapeError(problem(where, got=got, expected="one entry per compared step in each"))
    total = 0.0
    for meta, question, answer in zip(meta_match, question_match, answer_match, strict=True):
        if not meta:
            break
        total += (1.0 if question else 0.5) * (1.0 if answer else 0.5)
    return total


def coverage(student_steps: int, teacher_steps: int) -> float:
    """Return min(1, N_s / N_t): how much of the teacher's trace the student's is long enough to follow.

    The released code of RLKD computes this term and leaves it out of its reward; see `structural_reward`.

    Args:
        student_steps: N_s, steps of the student's trace, at least 0.
        teacher_steps: N_t, steps of the teacher's trace, at least 1.

    Raises:
        ShapeError: a count below that.

    Example:
        >>> coverage(3, 4), coverage(6, 4)
        (0.75, 1.0)
    """
    if student_steps < 0 or teacher_steps < 1:
        got = f"{student_steps} steps of the student, {teacher_steps} of the teacher"
        raise ShapeError(problem("coverage", got=got, expected="at least 0 and at least 1"))
    return min(1.0, student_steps / teacher_steps)
