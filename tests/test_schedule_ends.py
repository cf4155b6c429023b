"""Schedules against the end of the run and the range of what they schedule, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from distillkit.betas.constant import Constant
from distillkit.betas.cosine import Cosine
from distillkit.betas.linear import Linear
from distillkit.betas.reward_progress import RewardProgress
from distillkit.betas.switch import Switch
from distillkit.components import BetaScheduler
from distillkit.divergences.power import PowerDivergence
from distillkit.errors import ConfigError
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.trrd import TRRD
from distillkit.refusals import StepParts, check_parts
from distillkit.rewards.answer import AnswerReward
from distillkit.samplers.hf import HFSampler
from distillkit.schedules import end_point_problems, unfinished
from distillkit.teachers.local import LocalTeacher


class Foreign(BetaScheduler):
    """Another package's, which says nothing of its end."""

    def value(self, step: int, signals: Mapping[str, float]) -> float:
        return 7.0


def test_a_run_that_ends_before_its_schedules_is_told_so() -> None:
    schedules: dict[str, BetaScheduler] = {
        "model.beta": Linear(start=1.0, end=0.0, steps=40),
        "model.reference_beta": Cosine(start=1.0, end=0.0, steps=41),
        "model.schedules.policy_weight": Switch(before=0.0, after=1.0, at=40),
        "model.schedules.objective.clip_low": Switch(before=0.0, after=1.0, at=39),
        "model.schedules.objective.clip_high": RewardProgress(start=1.0, end=0.0, high=1.0),
        "model.schedules.distil_temperature": Foreign(),
    }
    assert unfinished(schedules, 40) == [
        "model.reference_beta: Cosine needs 41 steps to end, and trainer.max_steps is 40: the run ends first",
        "model.schedules.policy_weight: Switch needs 41 steps to end, and trainer.max_steps is 40: the run ends first",
    ]
    assert unfinished(schedules, 41) == unfinished(schedules, -1) == []


def ends(objective: Any, **schedules: BetaScheduler) -> list[str]:
    return list(end_point_problems({"objective": objective}, {f"objective.{k}": v for k, v in schedules.items()}))


RANGE = "    expected: between 0 (the teacher alone) and 1 (GRPO)"


@pytest.mark.parametrize(
    ("schedule", "value"),
    [
        (Linear(start=0.5, end=1.7, steps=9), 1.7),
        (Linear(start=-0.5, end=0.7, delta=0.1), -0.5),
        (Cosine(start=0.5, end=1.7, steps=9), 1.7),
        (Switch(before=0.5, after=1.7, at=9), 1.7),
        (Constant(value=1.7), 1.7),
    ],
)
def test_both_ends_of_a_schedule_are_in_the_range_of_its_part(schedule: BetaScheduler, value: float) -> None:
    objective = TRRD(alpha=0.5)
    assert ends(objective, alpha=schedule) == [f"model.schedules.objective.alpha\n    got:      {value}\n{RANGE}"]
    assert objective.alpha == 0.5


def test_values_that_are_never_reached_or_not_known_are_not_judged() -> None:
    assert ends(TRRD(), alpha=Switch(before=1.7, after=0.5, at=0)) == []
    assert ends(TRRD(), alpha=Foreign()) == []
    assert ends(TRRD(), alpha=RewardProgress(start=9.0, end=0.0, high=1.0)) == []
    assert ends(TRRD(), alpha=Linear(start=0.0, end=1.0, steps=3)) == []


class Wrapped(GRPO):
    """Keeps what it was given under another name, so that it cannot be made again from its attributes."""

    def __init__(self, *, low: float = 0.2) -> None:
        super().__init__(clip_low=low)


class Halved(GRPO):
    """Keeps half of what it was given: made again from its attributes it would refuse itself."""

    def __init__(self, *, clip_low: float = 0.8) -> None:
        if clip_low < 0.5:
            raise ConfigError("too low")
        super().__init__(clip_low=clip_low / 2)


def test_parts_that_cannot_be_made_again_are_left_alone() -> None:
    too_high = Constant(value=9.0)
    assert ends(Wrapped(), clip_low=too_high) == []
    assert ends(Halved(), clip_low=too_high) == []


def test_every_bad_end_is_refused_with_the_other_problems_of_the_parts() -> None:
    parts = StepParts(
        sampler=HFSampler(),
        teacher=LocalTeacher(path="t"),
        rewards=(AnswerReward(),),
        objective=TRRD(),
        divergence=PowerDivergence(),
        beta=Constant(value=1.0),
        schedules={
            "objective.alpha": Linear(start=0.5, end=1.7, steps=5),
            "sampler.max_new_tokens": Linear(start=8, end=-8, steps=5),
            "objective.alfa": Constant(value=1.0),
        },
    )
    with pytest.raises(ConfigError) as caught:
        check_parts(parts, "loss")
    heads = [line for line in str(caught.value).splitlines() if not line.startswith(" ")]
    assert heads == [
        "model.schedules.objective.alfa: no such number",
        "model.schedules.sampler.max_new_tokens",
        "model.schedules.objective.alpha",
    ]
