"""The token advantages of the methods that join rewards and a teacher, through a whole step, by hand.

The numbers follow from the table in `by_hand`: Â = (1, −1, 0, 0), d = −½ at a and +1 at b, β = 0.2.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from distillkit.betas.constant import Constant
from distillkit.betas.linear import Linear
from distillkit.betas.switch import Switch
from distillkit.divergences.sampled import K1, K2
from distillkit.errors import ConfigError
from distillkit.maskers.group_level import GroupLevel
from distillkit.maskers.response_level import ResponseLevel
from distillkit.maskers.routed import Routed
from distillkit.objectives.grpo import GRPO
from distillkit.objectives.rlsd import RLSD
from distillkit.objectives.trrd import TRRD
from distillkit.prepared import StepSettings
from tests.objectives.by_hand import advantages, run

PLAIN: dict[str, Any] = {"std": False, "aggregation": "token"}
THROUGH = StepSettings(distill_through="advantage")
ONE = Constant(value=1.0)
E_QUARTER, E_HALF = math.exp(0.25), math.exp(-0.5)

MIX = "between 0 (GRPO) and 1 (the teacher's factor alone)"

METHODS: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    # d
    "OPD": (
        {"objective": GRPO(**PLAIN), "divergence": K1(), "beta": ONE, "rewards": False, "settings": THROUGH},
        [[-0.5, 1.0], [-0.5], [1.0], [1.0, -0.5]],
    ),
    "OPD beside rewards that are only logged": (
        {
            "objective": GRPO(**PLAIN),
            "divergence": K1(),
            "beta": ONE,
            "settings": StepSettings(distill_through="advantage", policy_weight=0.0),
        },
        [[-0.5, 1.0], [-0.5], [1.0], [1.0, -0.5]],
    ),
    "GRPO": ({"objective": GRPO(**PLAIN)}, [[1.0, 1.0], [-1.0], [0.0], [0.0, 0.0]]),
    # Â + β·d
    "KDRL": (
        {"objective": GRPO(**PLAIN), "divergence": K1(), "settings": THROUGH},
        [[0.9, 1.2], [-1.1], [0.2], [0.2, -0.1]],
    ),
    "KDRL, k2 as a loss": (
        {"objective": GRPO(**PLAIN), "divergence": K2()},
        [[0.9, 1.2], [-1.1], [0.2], [0.2, -0.1]],
    ),
    # Â + (1 − c)·β·d
    "KDRL-mask": (
        {"objective": GRPO(**PLAIN), "divergence": K1(), "masker": ResponseLevel(), "settings": THROUGH},
        [[1.0, 1.0], [-1.1], [0.2], [0.2, -0.1]],
    ),
    "KDRL-mask, k2 as a loss": (
        {"objective": GRPO(**PLAIN), "divergence": K2(), "masker": ResponseLevel()},
        [[1.0, 1.0], [-1.1], [0.2], [0.2, -0.1]],
    ),
    # Â + C·β·d
    "HDPO": (
        {"objective": GRPO(**PLAIN), "divergence": K1(), "masker": GroupLevel(), "settings": THROUGH},
        [[1.0, 1.0], [-1.0], [0.2], [0.2, -0.1]],
    ),
    # c·Â + (1 − c)·d
    "SRPO": (
        {"objective": GRPO(**PLAIN), "divergence": K1(), "beta": ONE, "masker": Routed(), "settings": THROUGH},
        [[1.0, 1.0], [-0.5], [1.0], [1.0, -0.5]],
    ),
    "SRPO, k2 as a loss": (
        {"objective": GRPO(**PLAIN), "divergence": K2(), "beta": ONE, "masker": Routed()},
        [[1.0, 1.0], [-0.5], [1.0], [1.0, -0.5]],
    ),
    "SRPO with β = 0 is GRPO on correct responses": (
        {
            "objective": GRPO(**PLAIN),
            "divergence": K1(),
            "beta": Constant(value=0.0),
            "masker": Routed(),
            "settings": THROUGH,
        },
        [[1.0, 1.0], [0.0], [0.0], [0.0, 0.0]],
    ),
    # Â·((1 − λ) + λ·clip(e^{sign(Â)·d}, 1 ± ε)): e^−½ → 0.8 and e → 1.2 where Â > 0, e^½ → 1.2 where Â < 0
    "RLSD": ({"objective": RLSD(mix=0.5, bound=0.2, std=False)}, [[0.9, 1.1], [-1.1], [0.0], [0.0, 0.0]]),
    "RLSD, λ = 1 and a wide bound": (
        {"objective": RLSD(mix=1.0, bound=0.9, std=False)},
        [[E_HALF, 1.9], [-math.exp(0.5)], [0.0], [0.0, 0.0]],
    ),
    "RLSD, λ = 0, is GRPO": ({"objective": RLSD(mix=0.0, std=False)}, [[1.0, 1.0], [-1.0], [0.0], [0.0, 0.0]]),
    # Â·r with r = e^{−(1−α)d}: e^¼ at a, e^−½ at b; above 1.28 a good token's gradient is gone
    "TRRD without a clip": (
        {"objective": TRRD(alpha=0.5, clip_low=1.0, clip_high=9.0, **PLAIN)},
        [[E_QUARTER, E_HALF], [-E_QUARTER], [0.0], [0.0, 0.0]],
    ),
    "TRRD": ({"objective": TRRD(alpha=0.5, **PLAIN)}, [[0.0, E_HALF], [-E_QUARTER], [0.0], [0.0, 0.0]]),
    "TRRD, α = 1, is GRPO": ({"objective": TRRD(alpha=1.0, **PLAIN)}, [[1.0, 1.0], [-1.0], [0.0], [0.0, 0.0]]),
}


@pytest.mark.parametrize("name", METHODS)
def test_token_advantages_of_a_first_update(name: str) -> None:
    slots, want = METHODS[name]
    (found,), _ = run(**slots)
    for ours, theirs in zip(advantages(found), want, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_opd_then_rl_distils_first_and_learns_from_rewards_afterwards() -> None:
    """d for step < 2, then Â: neither has anything of the other, and the two use one denominator."""
    slots: dict[str, Any] = {
        "objective": GRPO(**PLAIN),
        "divergence": K1(),
        "beta": Switch(before=1.0, after=0.0, at=2),
        "schedules": {"policy_weight": Switch(before=0.0, after=1.0, at=2)},
        "settings": THROUGH,
    }
    for step in (0, 1, 2, 3):
        (found,), output = run(step=step, **slots)
        want = METHODS["OPD" if step < 2 else "GRPO"][1]
        assert advantages(found) == [pytest.approx(row, abs=1e-6) for row in want]
        assert output.metrics["train/beta"] == float(step < 2)
        assert output.metrics["schedule/policy_weight"] == float(step >= 2)


def test_the_correct_responses_keep_their_place_in_the_groups_mean() -> None:
    """Under routing the wrong response's Â is not used, but its reward still makes the correct one's Â 1, not 2."""
    _, output = run(**METHODS["SRPO"][0])
    assert output.per_token["advantages"].abs().max() == 1.0
    assert output.per_token["policy_weight"][:, 0].tolist() == [1, 0, 0, 0]
    assert output.per_token["distil_weight"][:, 0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(("unknown", "last"), [("drop", [0.0, 0.0]), ("keep", [1.0, -0.5])])
def test_a_response_of_unknown_correctness_is_routed_by_the_rule(unknown: Any, last: list[float]) -> None:
    (found,), _ = run(
        objective=GRPO(**PLAIN),
        divergence=K1(),
        beta=ONE,
        masker=Routed(unknown=unknown),
        settings=THROUGH,
        correct=(True, False, False, None),
    )
    assert advantages(found)[3] == pytest.approx(last, abs=1e-6)
    assert advantages(found)[2] == pytest.approx([1.0], abs=1e-6)


@pytest.mark.parametrize("objective", [RLSD(std=False), TRRD(**PLAIN)], ids=["rlsd", "trrd"])
def test_where_the_teacher_is_blind_the_token_is_grpos(objective: GRPO) -> None:
    (found,), _ = run(objective=objective, blind=(0,))
    assert advantages(found)[0] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert advantages(found)[1] != pytest.approx([-1.0], abs=1e-2)


def test_rlsds_factor_is_fixed_when_the_tokens_are_sampled() -> None:
    """A second inner epoch, after log π_θ(a) moved by 0.1: the ratio is e^0.1 there, d still −½."""
    (first, second), _ = run(objective=RLSD(std=False, bound=0.6), settings=StepSettings(inner_epochs=2), moved=0.1)
    factor = 0.5 + 0.5 * math.exp(-0.5)
    assert advantages(first)[0] == pytest.approx([factor, 0.5 + 0.5 * 1.6], abs=1e-6)
    assert advantages(second)[0] == pytest.approx([math.exp(0.1) * factor, 0.5 + 0.5 * 1.6], abs=1e-6)


@pytest.mark.parametrize("skip", [True, False])
def test_shares_at_the_clamp_and_the_clips_reach_the_metrics(skip: bool) -> None:
    """Over the three tokens of group A, whose rollouts alone are learned from: a, b and a.

    TRRD, clamp 0.9: |log π_θ − log π_T| is 1 at b, ½ at a; e^¼ > 1.28 with Â > 0 at one token.
    """
    settings = StepSettings(skip_zero_weight=skip)
    _, output = run(objective=TRRD(clamp=0.9, **PLAIN), settings=settings)
    assert output.metrics["train/teacher_clamped"] == pytest.approx(1 / 3)
    assert output.metrics["train/clipped_high"] == pytest.approx(1 / 3)
    assert output.metrics["train/clipped_low"] == 0.0
    other = (False, True, False, False)
    low = run(objective=TRRD(clip_high=9.0, **PLAIN), correct=other, settings=settings)[1]
    assert low.metrics["train/clipped_low"] == pytest.approx(1 / 3)  # b of the first rollout, e^−½ < 0.8 with Â < 0
    rlsd = run(objective=RLSD(std=False), settings=settings)[1]
    assert rlsd.metrics["train/teacher_clamped"] == 1.0  # e^−½ to 0.9, e^½ and e to 1.1
    assert rlsd.metrics["train/teacher_factor"] == pytest.approx((0.9 + 1.1 + 1.1) / 3)


@pytest.mark.parametrize(
    ("objective", "name", "line", "got", "expected"),
    [
        (TRRD(), "alpha", Linear(start=0.5, end=1.5, steps=2), 1.5, "between 0 (the teacher alone) and 1 (GRPO)"),
        (TRRD(), "alpha", Linear(start=0.5, end=-0.5, steps=2), -0.5, "between 0 (the teacher alone) and 1 (GRPO)"),
        (TRRD(), "clamp", Linear(start=1.0, end=-1.0, steps=2), -1.0, "above 0 nats, or null for none"),
        (
            RLSD(),
            "mix",
            Linear(start=0.5, end=2.0, steps=2),
            2.0,
            "between 0 (GRPO) and 1 (the teacher's factor alone)",
        ),
        (GRPO(), "clip_low", Linear(start=0.2, end=1.2, steps=2), 1.2, "between 0 and 1"),
    ],
    ids=["alpha up", "alpha down", "clamp", "mix", "clip_low"],
)
def test_a_schedule_that_leaves_the_range_is_refused_when_the_run_starts(
    objective: GRPO, name: str, line: Linear, got: float, expected: str
) -> None:
    slots: dict[str, Any] = {"objective": objective, "schedules": {f"objective.{name}": line}}
    with pytest.raises(ConfigError) as error:
        run(step=0, **slots)
    assert str(error.value) == (f"model.schedules.objective.{name}\n    got:      {got}\n    expected: {expected}")
    with pytest.raises(ConfigError, match=rf"model\.schedules\.objective\.{name}"):  # without rewards too
        run(step=0, divergence=K1(), rewards=False, settings=THROUGH, **slots)


@pytest.mark.parametrize(("normalize", "tokens"), [("eligible", 6), ("kept", 4)])
def test_a_token_without_either_weight_leaves_the_denominator_when_asked(normalize: Any, tokens: int) -> None:
    """The last response is of unknown correctness and dropped: four of the six tokens learn something."""
    (found,), _ = run(
        objective=GRPO(**PLAIN),
        divergence=K1(),
        beta=ONE,
        masker=Routed(),
        settings=StepSettings(distill_through="advantage", normalize=normalize),
        correct=(True, False, False, None),
    )
    assert [-tokens * g for g in found["b"]] == pytest.approx([1.0], abs=1e-6)
    assert [-tokens * g for g in found["a"]] == pytest.approx([-0.5], abs=1e-6)
    assert "ba" not in found
