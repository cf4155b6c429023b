"""A final answer compared with the reference as mathematics."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from distillkit.components import RewardFn, StudentInfo
from distillkit.errors import ConfigError, problem
from distillkit.rewards.extract import final_answer, gold_answer, gold_cell, normal_form, plain_number
from distillkit.rewards.math_answers import WARM_UP
from distillkit.rewards.pool import VerifierPool
from distillkit.types import RewardOutput, RewardStatus, RolloutBatch

__all__ = ["MathVerify"]

_AGREE = 1e-6
"""Two numbers that differ by less go to the library, which rounds to six decimals; others are plainly different."""


class MathVerify(RewardFn):
    r"""1 when the completion's final answer equals the row's, as mathematics; else 0.

    `27` equals `27.0`, `\frac12` equals `0.5`, `1,000` equals `1000`. The answer is the last `\boxed{...}`; without
    one, a last line `#### ...`, what follows "answer is" or "answer:", or a last line that is nothing but a number or a
    formula in dollars.

    Comparison runs in worker processes under a deadline. Wrong: 0. No answer found, or one that is no expression: 0,
    `unparseable`. Past the deadline or out of memory: NaN, `timed_out` or `crashed`, and correctness is unknown. A row
    whose own answer is not an expression gives NaN, `not_applicable`; `check_rows` lists such rows.

    See *Math-Verify: a robust mathematical expression evaluation system*, Kydlíček, Hugging Face, 2025,
    https://github.com/huggingface/Math-Verify.

    Args:
        answer: column with the reference: a number, an expression in LaTeX, a GSM8K answer (`... #### 18`) or a MATH
            solution (`... \boxed{18} ...`).
        require_boxed: count only a boxed answer.
        workers: verifier processes on each rank.
        timeout_s: seconds for one answer, from the start of the work on it.
        memory_mb: address space of a verifier process, in MiB.
        weight: factor on this reward in the total.

    Raises:
        ConfigError: the package math-verify is not installed (at `setup`), or an argument out of range.
    """

    def __init__(
        self,
        *,
        answer: str = "answer",
        require_boxed: bool = False,
        workers: int = 2,
        timeout_s: float = 5.0,
        memory_mb: int = 4096,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        self.answer = answer
        self.require_boxed = require_boxed
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self._pool = VerifierPool(
            "distillkit.rewards.math_answers.judge",
            workers=workers,
            timeout_s=timeout_s,
            memory_mb=memory_mb,
            warm_up=WARM_UP,
            owner="model.rewards: math_verify",
        )

    def setup(self, student: StudentInfo | None = None) -> None:
        """Start the verifier processes."""
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                problem(
                    "model.rewards: math_verify needs the package math-verify",
                    got="no module named math_verify",
                    expected="math-verify 0.9 or later",
                    hint="pip install 'math-verify>=0.9'",
                )
            )
        self._pool.start()

    def teardown(self) -> None:
        """End the verifier processes."""
        self._pool.close()

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        """Return the rows whose reference is missing or is not an expression."""
        golds = [gold_answer(row.get(self.answer)) for row in rows]
        to_parse = sorted({gold for gold in golds if gold is not None and plain_number(gold) is None})
        verdicts = {}
        if to_parse:
            self.setup()
            results = self._pool.run([{"gold": gold} for gold in to_parse])
            verdicts = dict(zip(to_parse, results, strict=True))
        bad = []
        for i, (row, gold) in enumerate(zip(rows, golds, strict=True)):
            if gold is None:
                there = self.answer in row
                bad.append((i, f"{row[self.answer]!r:.80} is not an answer" if there else f"no column {self.answer!r}"))
            elif (result := verdicts.get(gold)) is None or result.value == "gold":
                continue
            elif result.status == "done":
                bad.append((i, f"{gold!r:.80} is not an expression"))
            else:
                bad.append((i, f"{gold!r:.80} could not be read: {result.status}, {result.detail}"))
        return bad

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        """Return 1 or 0 for each rollout, NaN where it could not be compared."""
        golds = [gold_answer(gold_cell(row, self.answer, "math_verify")) for row in rollouts.rows]
        found = [final_answer(text, require_boxed=self.require_boxed) for text in rollouts.texts]
        status: list[RewardStatus] = ["scored"] * len(rollouts)
        correct: list[bool | None] = [None] * len(rollouts)
        ask: dict[tuple[str, str | None], list[int]] = {}
        for i, (gold, answer) in enumerate(zip(golds, found, strict=True)):
            if gold is None:
                status[i] = "not_applicable"
            elif (verdict := _at_a_glance(gold, answer)) is not None:
                correct[i] = verdict
                status[i] = "unparseable" if answer is None else "scored"
            else:
                ask.setdefault((gold, answer), []).append(i)
        payloads = [{"gold": gold, "answer": answer} for gold, answer in ask]
        for where, result in zip(ask.values(), self._pool.run(payloads) if ask else (), strict=True):
            for i in where:
                if result.status != "done":
                    status[i] = result.status
                elif result.value == "bad_gold":
                    status[i] = "not_applicable"
                else:
                    correct[i] = result.value == "correct"
                    status[i] = "unparseable" if result.value == "unparseable" else "scored"
        return RewardOutput.single(
            "math_verify",
            [None if c is None else float(c) for c in correct],
            weight=self.weight,
            status=status,
            correct=correct,
            answers=[_vote(*entry) for entry in zip(golds, found, correct, strict=True)],
        )


def _at_a_glance(gold: str, answer: str | None) -> bool | None:
    """Return whether `answer` is right where two plain numbers decide it, None where it takes a parser."""
    reference = plain_number(gold)
    if reference is None:
        return None
    if answer is None:
        return False
    value = plain_number(answer)
    if value is None or 0 < abs(value - reference) < _AGREE:
        return None
    return value == reference


def _vote(gold: str | None, answer: str | None, correct: bool | None) -> str | None:
    """Return the answer's normal form; the reference's for an answer that equals it, so that equals vote as one."""
    if answer is None:
        return None
    return normal_form(gold if correct and gold is not None else answer)
