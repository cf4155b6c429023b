"""Conformance of rewards."""

from __future__ import annotations

from typing import get_args

import torch

from distillkit.components import RewardFn, StudentInfo
from distillkit.errors import DataError
from distillkit.testing.constructor import check_common
from distillkit.testing.fakes import rollout_batch, student_info
from distillkit.testing.findings import Findings, close, pad, permute
from distillkit.types import CORRECT, NOT_A_SCORE, UNKNOWN, WRONG, RewardOutput, RewardStatus, RolloutBatch

__all__ = ["check_reward"]


def check_reward(part: RewardFn, *, rollouts: RolloutBatch | None = None, student: StudentInfo | None = None) -> None:
    """Check a reward: one value per rollout, NaN exactly where it was not scored, correctness never made up.

    Args:
        part: the reward, not yet set up.
        rollouts: what to value, when the part needs columns of its own (the suite's rows have `answer`).
        student: the student it is set up for.

    Raises:
        ConformanceError: with every broken rule.
        DataError: the part's own, about columns that the suite's rows do not have.
    """
    findings = Findings(part)
    check_common(findings, part)
    rollouts = rollout_batch() if rollouts is None else rollouts
    with findings.rule("setup"):
        part.setup(student_info() if student is None else student)
    try:
        with findings.rule("cannot be called with rollouts", DataError):
            with findings.untouched(rollouts):
                output = part(rollouts)
            if findings.expect(isinstance(output, RewardOutput), f"returns {type(output).__name__}, not RewardOutput"):
                _output(findings, output, rollouts)
                _arrangements(findings, part, output, rollouts)
        with findings.rule("check_rows", DataError):
            found = part.check_rows(list(rollouts.rows))
            ok = all(isinstance(i, int) and 0 <= i < len(rollouts) and bool(reason) for i, reason in found)
            findings.expect(ok, "check_rows returns something else than (row index, reason) pairs")
    finally:
        part.teardown()
    findings.finish()


def _output(findings: Findings, output: RewardOutput, rollouts: RolloutBatch) -> None:
    n = len(rollouts)
    if not findings.expect(len(output.answers) == n, f"values {len(output.answers)} rollouts of {n}"):
        return
    findings.expect(output.names and all(output.names), "a reward has no name")
    findings.expect(len(set(output.names)) == len(output.names), f"names repeat: {output.names}")
    findings.expect(output.values.dtype == torch.float32, f"values are {output.values.dtype}, not float32")
    findings.expect(not output.values.isinf().any(), "a value is infinite")
    for column, statuses in enumerate(output.status):
        unknown = set(statuses) - set(get_args(RewardStatus))
        findings.expect(not unknown, f"unknown status {', '.join(sorted(map(repr, unknown)))}")
        for value, status in zip(output.values[:, column].tolist(), statuses, strict=True):
            missing = value != value
            if status in ("scored", "unparseable"):
                findings.expect(not missing, f"a value is NaN with status {status!r}")
            else:
                findings.expect(missing, f"status {status!r} with the value {value}: what could not be scored is NaN")
            findings.expect(status != "unparseable" or value <= 0, f"an unparseable answer is worth {value}")
    findings.expect(output.correct.dtype == torch.int8, f"correct is {output.correct.dtype}, not int8")
    findings.expect(set(output.correct.tolist()) <= {CORRECT, WRONG, UNKNOWN}, "correct is none of 1, 0, -1")
    for i, correct in enumerate(output.correct.tolist()):
        unscored = all(statuses[i] in NOT_A_SCORE for statuses in output.status)
        text = "a rollout that could not be scored has a known correctness"
        findings.expect(not unscored or correct == UNKNOWN, text)
    if output.token_values is not None:
        shape = list(output.token_values.shape)
        findings.expect(shape == list(rollouts.tokens.shape), f"token_values are {shape}, not [N, L]")
        findings.expect(not output.token_values.requires_grad, "token_values carry gradient")
    findings.expect(not output.values.requires_grad, "values carry gradient")


def _arrangements(findings: Findings, part: RewardFn, output: RewardOutput, rollouts: RolloutBatch) -> None:
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(0))
    moved, want = part(permute(rollouts, order)), permute(output, order)
    text = "a value depends on the place of the rollout in the batch"
    findings.expect(close(moved.values, want.values) and moved.status == want.status, text)
    findings.expect(torch.equal(moved.correct, want.correct) and moved.answers == want.answers, text)
    wider = part(pad(rollouts, rollouts.tokens.shape[1], 3))
    text = "a value depends on the padding"
    findings.expect(close(wider.values, output.values) and torch.equal(wider.correct, output.correct), text)
