"""The reward suite must fail rewards broken on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from distillkit.components import RewardFn, StudentInfo
from distillkit.errors import DataError
from distillkit.testing import check, check_class, check_reward, rollout_batch
from distillkit.types import RewardOutput, RolloutBatch
from tests.testing.broken import finds


class Sound(RewardFn):
    """1 for the row's answer; empty completions are unparseable, prompts with a 4 are not this reward's business."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        values: list[float | None] = []
        for text, row, prompt in zip(rollouts.texts, rollouts.rows, rollouts.prompts, strict=True):
            applies = "4" not in str(prompt)
            values.append(float(text == row["answer"]) if applies else None)
        correct = [None if v is None else v == 1.0 for v in values]
        return self.change(RewardOutput.single("sound", values, correct=correct), rollouts)

    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return output


class TooFew(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return RewardOutput.single("sound", output.values[:-1, 0].tolist())


class Floats(Sound):
    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        return [1.0] * len(rollouts)  # type: ignore[return-value]


class NanButScored(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, status=(("scored",) * len(rollouts),))


class TimedOutIsZero(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        status = tuple("timed_out" if s == "not_applicable" else s for s in output.status[0])
        return replace(output, values=output.values.nan_to_num(0.0), status=(status,))  # type: ignore[arg-type]


class CrashedIsWrong(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        status = tuple("crashed" if s == "not_applicable" else s for s in output.status[0])
        correct = output.correct.clamp(min=0)
        return replace(output, correct=correct, status=(status,))  # type: ignore[arg-type]


class UnparseablePays(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        status = tuple("unparseable" if s == "scored" else s for s in output.status[0])
        return replace(output, status=(status,))  # type: ignore[arg-type]


class OwnStatus(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, status=(("ok",) * len(rollouts),))  # type: ignore[arg-type]


class InfiniteValue(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, values=output.values - torch.inf)


class Doubles(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, values=output.values.double())


class Bools(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, correct=output.correct == 1)


class NoName(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, names=("",))


class FirstIsBest(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        place = torch.arange(len(rollouts), dtype=torch.float32).unsqueeze(1)
        return replace(output, values=output.values - 0.1 * place)


class CountsPadding(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, values=output.values - 0.1 * rollouts.tokens.shape[1])


class PerTokenOfAnotherLength(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        return replace(output, token_values=torch.zeros(len(rollouts), 3))


class EditsRollouts(Sound):
    def change(self, output: RewardOutput, rollouts: RolloutBatch) -> RewardOutput:
        rollouts.loss_mask.logical_and_(rollouts.tokens != 1)
        return output


class RowsAsStrings(Sound):
    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
        return [("row 0", "no answer")]  # type: ignore[list-item]


class CannotSetUp(Sound):
    def setup(self, student: StudentInfo) -> None:
        raise RuntimeError("no pool")


class NeedsColumn(Sound):
    """Needs a column that the suite's rows do not have."""

    def __call__(self, rollouts: RolloutBatch) -> RewardOutput:
        if any("trace" not in row for row in rollouts.rows):
            raise DataError("reward needs_column: no column 'trace'")
        return super().__call__(rollouts)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (TooFew(), "values 11 rollouts of 12"),
        (Floats(), "returns list, not RewardOutput"),
        (NanButScored(), "a value is NaN with status 'scored'"),
        (TimedOutIsZero(), "status 'timed_out' with the value 0.0: what could not be scored is NaN"),
        (CrashedIsWrong(), "a rollout that could not be scored has a known correctness"),
        (UnparseablePays(), "an unparseable answer is worth 1.0"),
        (OwnStatus(), "unknown status 'ok'"),
        (InfiniteValue(), "a value is infinite"),
        (Doubles(), "values are torch.float64, not float32"),
        (Bools(), "correct is torch.bool, not int8"),
        (NoName(), "a reward has no name"),
        (FirstIsBest(), "a value depends on the place of the rollout in the batch"),
        (CountsPadding(), "a value depends on the padding"),
        (PerTokenOfAnotherLength(), "token_values are [12, 3], not [N, L]"),
        (EditsRollouts(), "edits its input RolloutBatch.loss_mask in place"),
        (RowsAsStrings(), "check_rows returns something else than (row index, reason) pairs"),
        (CannotSetUp(), "setup: RuntimeError: no pool"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, RewardFn) else "",
)
def test_broken_rewards_are_found(part: RewardFn, text: str) -> None:
    finds(part, text)


def test_a_sound_reward_passes() -> None:
    check(Sound())


def test_columns_of_its_own_are_given_to_the_suite() -> None:
    with pytest.raises(DataError, match="no column 'trace'"):
        check(NeedsColumn())
    assert check_class("reward", NeedsColumn) == "constructor"
    groups = {"1+1=": ["2", "3"], "1+2=": ["3", "2"]}
    rows = [{"answer": "2", "trace": "1+1"}, {"answer": "3", "trace": "1+2"}]
    check_reward(NeedsColumn(), rollouts=rollout_batch(groups, rows=rows))
